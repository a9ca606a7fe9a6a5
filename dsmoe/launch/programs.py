"""How the programs of this Python's environment are typed in the user's shell, which need not find them by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from dsmoe.launch.quoting import path_argument, shell_word


def typed(name: str) -> str:
    """A program as it is typed: by its name where the shell finds that of this environment, else by its path.

    So `make train`, for which nobody has activated `.venv`, ends with commands that run as they are printed.
    """
    own = Path(sys.executable).parent / name
    if not own.exists() or _is_found(own):
        return name
    return shell_word(path_argument(_from_here(own)), f"the path of {name}")


def activation(name: str) -> str | None:
    """What makes the shell find a program of this environment by its name; None where it does, or there is none."""
    own = Path(sys.executable).parent / name
    if not own.exists() or _is_found(own):
        return None
    script = own.with_name("activate")
    folder = shell_word(_from_here(own.parent), "the path of Python")
    return f". {folder}/activate" if script.exists() else f"PATH={folder}:$PATH"


def _is_found(own: Path) -> bool:
    found = shutil.which(own.name)
    return found is not None and os.path.samefile(found, own)


def _from_here(path: Path) -> str:
    """From the working directory where it is below that, else from the root."""
    here = Path.cwd()
    text = str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
    return text if "/" in text else f"./{text}"
