"""The files of a run folder by their names: none is a pipe, and those that say whose it is go with a failed start."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dsmoe.config.errors import UserError
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file
from dsmoe.train.identity import RECORD

LOCK, TOKEN = ".lock", ".token"
_FILES = ("config.yaml", RECORD, LOCK, TOKEN, "metrics.jsonl", "train.log", "environment.json", "ds_config.json")
"""The files that a run reads and writes in its folder."""


def refuse_special(folder: Path) -> None:
    """Refuse a folder where a pipe or a device has the name of a run's file: reading it may take for ever."""
    for name in _FILES:
        try:
            check_regular(folder / name)
        except NotAFileError as error:
            raise UserError(f"{folder / name} {not_a_file(error)}; move it away") from None
        except OSError:  # whoever uses it says so
            continue


def forget_run(folder: Path) -> None:
    """Remove what says whose run a folder holds: none has begun there, and the next start may be of another config."""
    for name in ("config.yaml", RECORD):
        with suppress(OSError):
            (folder / name).unlink()
