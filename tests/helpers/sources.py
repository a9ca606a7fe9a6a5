"""The repository's own code as text, for tests of what holds in all of it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def sources(*folders: str) -> dict[str, str]:
    """The Python files of these folders, by their path from the repository's root."""
    files = (path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in files}
