"""Programs of this Python's environment, as to type them in the user's shell, which need not find them by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from dsmoe.launch.quoting import path_argument, shell_word


def command_name(name: str) -> str:
    """Return a program as to type it: its name if the shell finds the one of this environment, else its path.

    So that `make train`, which needs no activated `.venv`, ends with commands that run as printed.
    """
    own = Path(sys.executable).parent / name
    if not own.exists() or _is_found(own):
        return name
    return shell_word(path_argument(_relative_path(own)), f"the path of {name}")


def activation(name: str) -> str | None:
    """Return the command after which the shell finds a program by name; None if it does already, or there is none."""
    own = Path(sys.executable).parent / name
    if not own.exists() or _is_found(own):
        return None
    script = own.with_name("activate")
    folder = shell_word(_relative_path(own.parent), "the path of Python")
    return f". {folder}/activate" if script.exists() else f"PATH={folder}:$PATH"


def _is_found(own: Path) -> bool:
    found = shutil.which(own.name)
    return found is not None and os.path.samefile(found, own)


def _relative_path(path: Path) -> str:
    """A path relative to the working directory if it is below that, else absolute."""
    working = Path.cwd()
    text = str(path.relative_to(working)) if path.is_relative_to(working) else str(path)
    return text if "/" in text else f"./{text}"
