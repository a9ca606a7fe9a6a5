"""Several processes of one run side by side, each with its own command and environment."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_side_by_side(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path
) -> tuple[list[int], list[str]]:
    """The exit codes of all, and what each has printed on either stream."""
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    return [process.returncode for process in processes], texts
