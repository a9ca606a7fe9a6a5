"""The folder of a run's checkpoints: which are there, and in what state. Changes nothing. No torch.

There is no pointer to the newest one that could lie: it is the whole one of the highest step, by its name.
"""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.checkpoint.manifest import (
    DamagedError,
    Manifest,
    Reading,
    UnreadableError,
    check_contents,
    check_files,
    check_headers,
)

logger = logging.getLogger(__name__)

LOOKS = (1.0, 4.0)
"""Seconds before each further look at a file that could not be read, or is not what was written."""
_NAME = re.compile(r"step_\d+", re.ASCII)


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def spare_name(checkpoint: Path) -> Path:
    """Another name of the same step, `step_000000100`, for when something that cannot be moved has the first."""
    digits = checkpoint.name.removeprefix("step_")
    while os.path.lexists(checkpoint.with_name(f"step_{digits}")):
        digits = f"0{digits}"
    return checkpoint.with_name(f"step_{digits}")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Every folder that has a checkpoint's name, whole or not, oldest first.

    Raises:
        OSError: the folder is there and cannot be read: no reason to take it for empty.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if _NAME.fullmatch(entry.name) and _may_be_folder(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / entry.name for entry in entries), key=lambda path: (step_of(path), len(path.name)))


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # storage that does not answer: looking into it will tell
        return True


def inspect(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there, of their sizes. What is in them is not looked at.

    Raises:
        DamagedError: they are not.
        UnreadableError: that cannot be seen now.
    """
    manifest = Manifest.read(checkpoint)
    check_files(checkpoint, manifest)
    if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != manifest.facts.step:
        raise DamagedError(f"{checkpoint} is not what its name says: it is of step {manifest.facts.step}")
    return manifest


def verify(checkpoint: Path) -> Manifest:
    """The manifest of a whole checkpoint; reads all of its files.

    Raises:
        DamagedError: it is not what was written.
        UnreadableError: that cannot be seen now.
    """
    manifest = inspect(checkpoint)
    check_contents(checkpoint, manifest, sorted(manifest.files))
    check_headers(checkpoint, manifest, sorted(manifest.files))
    return manifest


def check_surely(checkpoint: Path, manifest: Manifest, names: list[str], reading: Reading) -> None:
    """`check_contents`, and again where it finds something: a read that fails once is no damage."""
    for pause in LOOKS:
        try:
            return check_contents(checkpoint, manifest, names, reading)
        except UnreadableError as error:
            logger.error("%s; looking again in %.0f s", error, pause)
            time.sleep(pause)
        except DamagedError:
            time.sleep(LOOKS[0])
            break
    return check_contents(checkpoint, manifest, names, reading)


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that have all of their files, newest first, and why others were passed over."""
    found = look(folder)
    return list(found.whole), list(found.passed_over.values())


@dataclass
class Found:
    """The checkpoints of a folder, newest first."""

    whole: dict[Path, Manifest] = field(default_factory=dict)
    """Those that have all of their files, of the right sizes."""
    passed_over: dict[Path, str] = field(default_factory=dict)
    """The others, and what is wrong with each."""
    unreadable: dict[Path, UnreadableError] = field(default_factory=dict)
    """Of the others, those of which nobody knows: they cannot be read now."""

    @property
    def damaged(self) -> list[Path]:
        """The others that are known to be damaged."""
        return [path for path in self.passed_over if path not in self.unreadable]


def look(folder: Path) -> Found:
    """Inspect every checkpoint of a folder.

    Raises:
        OSError: the folder cannot be read.
    """
    found = Found()
    for checkpoint in reversed(all_checkpoints(folder)):
        try:
            found.whole[checkpoint] = inspect(checkpoint)
        except DamagedError as error:
            found.passed_over[checkpoint] = str(error)
            if isinstance(error, UnreadableError):
                found.unreadable[checkpoint] = error
    return found
