"""The folder of a run's checkpoints: their names, and checks that each is what was written. Changes nothing. No torch.

No pointer to the newest checkpoint could lie: the newest is the whole one of the highest step, by its name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from dsmoe.checkpoint.headers import TensorEntry, read_entries
from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest, UnreadableError, chunk_name
from dsmoe.plan.text import shown
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file

logger = logging.getLogger(__name__)

LOOKS = (1.0, 4.0)
"""Seconds before each further look at a file that could not be read, or is not what was written."""
_NAME = re.compile(r"step_\d+", re.ASCII)


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step_{step:08d}"


def spare_name(checkpoint: Path) -> Path:
    """Return another name of the same step, `step_000000100`, for when the first is taken for good."""
    digits = checkpoint.name.removeprefix("step_")
    while os.path.lexists(checkpoint.with_name(f"step_{digits}")):
        digits = f"0{digits}"
    return checkpoint.with_name(f"step_{digits}")


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Return every folder that has a checkpoint's name, whole or not, oldest first.

    Raises:
        OSError: the folder is there and cannot be read: no reason to take it for empty.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if _NAME.fullmatch(entry.name) and _may_be_folder(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Of two names of one step the longer is the newer one: `spare_name` made it beside the other.
    return sorted((folder / entry.name for entry in entries), key=lambda path: (step_of(path), len(path.name)))


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # storage that does not answer: looking into it will tell
        return True


def inspect(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint whose files are there, of their sizes; reads none of them.

    Raises:
        DamagedError: a file is missing or of another size.
        UnreadableError: that cannot be seen now.
    """
    manifest = Manifest.read(checkpoint)
    check_files(checkpoint, manifest)
    # A folder that somebody has renamed would count as newer, or older, than it is.
    if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != manifest.facts.step:
        raise DamagedError(f"{checkpoint} is not what its name says: it is of step {manifest.facts.step}")
    return manifest


def verify(checkpoint: Path) -> Manifest:
    """Return the manifest of a whole checkpoint; reads all of its files.

    Raises:
        DamagedError: a file is not what was written.
        UnreadableError: that cannot be seen now.
    """
    manifest = inspect(checkpoint)
    check_contents(checkpoint, manifest, sorted(manifest.files))
    check_headers(checkpoint, manifest, sorted(manifest.files))
    return manifest


def check_files(checkpoint: Path, manifest: Manifest) -> None:
    """Check that the folder has the manifest's files, of their sizes; reads no file.

    Raises:
        DamagedError: it has not.
    """
    for name, file in sorted(manifest.files.items()):
        path = checkpoint / name
        try:
            check_regular(path)
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):  # a run may be removing it
            raise DamagedError(f"{path} is missing") from None
        except (NotAFileError, IsADirectoryError) as error:
            raise DamagedError(f"{path} {not_a_file(error)}") from None
        except OSError as error:
            raise UnreadableError.from_error(path, error) from None
        if size != file.bytes:
            raise DamagedError(f"{path} has {size:,} bytes instead of {file.bytes:,}")


@dataclass(frozen=True)
class Reading:
    """Callbacks for the name of each file that is read, and for the number of bytes of each piece of it."""

    on_file: Callable[[str], None] = lambda _: None
    on_piece: Callable[[int], None] = lambda _: None


class _Counted(FileIO):
    """A file that reports how many bytes of it are read."""

    on_piece: Callable[[int], None]

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` and report the bytes."""
        count = super().readinto(buffer)
        self.on_piece(count)
        return count


def check_contents(checkpoint: Path, manifest: Manifest, names: Iterable[str], reading: Reading | None = None) -> None:
    """Check that the files called `names` have the manifest's checksums; reads all of them.

    Raises:
        DamagedError: one has not.
    """
    reading = reading or Reading()
    for name in names:
        path = checkpoint / name
        reading.on_file(name)
        try:
            with _Counted(path) as stream:
                stream.on_piece = reading.on_piece
                found = hashlib.file_digest(stream, xxh3_128).hexdigest()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DamagedError(f"cannot read {path}: {error.strerror}") from None
        except OSError as error:
            raise UnreadableError.from_error(path, error) from None
        if found != manifest.files[name].xxh128:
            raise DamagedError(f"{path} is damaged: it is not what was written")


def check_surely(checkpoint: Path, manifest: Manifest, names: list[str], reading: Reading) -> None:
    """`check_contents`, and again where it finds something: a read that fails once is no damage."""
    for pause in LOOKS:
        try:
            return check_contents(checkpoint, manifest, names, reading)
        except UnreadableError as error:
            logger.error("%s; looking again in %.0f s", error, pause)
            time.sleep(pause)
        except DamagedError:
            time.sleep(LOOKS[0])  # real damage is seen again at the second look
            break
    return check_contents(checkpoint, manifest, names, reading)


def check_headers(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check that the files called `names` have the manifest's chunks at its offsets; reads their headers.

    Raises:
        DamagedError: one has not: other weights would be loaded.
    """
    # Checksums prove the files, and the seal the manifest; that both belong together, only the files' headers tell.
    for name, entries in _entries_by_file(checkpoint, manifest, names).items():
        _check_header(checkpoint, name, entries)


def _entries_by_file(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, dict[str, TensorEntry]]:
    """Return for each of the files the header entries that agree with the manifest."""
    found: dict[str, dict[str, TensorEntry]] = {name: {} for name in names}
    for key, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file in found:
                entry = TensorEntry(checkpoint / chunk.file, tensor.dtype, chunk.shape, chunk.offset)
                found[chunk.file][chunk_name(key, chunk.start)] = entry
    return found


def _check_header(checkpoint: Path, name: str, expected: dict[str, TensorEntry]) -> None:
    """Check that a file has exactly these entries."""
    try:
        actual = read_entries(checkpoint / name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"cannot read {checkpoint / name}: {error.strerror}") from None
    except OSError as error:
        raise UnreadableError.from_error(checkpoint / name, error) from None
    except ValueError as error:
        raise DamagedError(f"{checkpoint / name} is damaged: it is not a whole safetensors file: {error}") from None
    for chunk in sorted(expected.keys() | actual.keys()):
        if expected.get(chunk) != actual.get(chunk):
            raise DamagedError(
                f"{checkpoint / MANIFEST} is damaged: {shown(chunk)} of {name} is "
                f"{_described(expected.get(chunk))} there, and {_described(actual.get(chunk))} in the file's own header"
            )


def _described(entry: TensorEntry | None) -> str:
    return "not" if entry is None else f"{entry.dtype} {list(entry.shape)} at byte {entry.offset}"


def other_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return the names in the folder that the manifest does not list: no part of the checkpoint.

    Raises:
        UnreadableError: that cannot be seen now.
    """
    try:
        names = {entry.name for entry in os.scandir(checkpoint)}
    except OSError as error:
        raise UnreadableError.from_error(checkpoint, error) from None
    return sorted(names - manifest.files.keys() - {MANIFEST})


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints that have all of their files, newest first, and why others were passed over."""
    found = look(folder)
    return list(found.whole), list(found.passed_over.values())


@dataclass
class Found:
    """The checkpoints of a folder, newest first."""

    whole: dict[Path, Manifest] = field(default_factory=dict)
    """Checkpoints that have all of their files, of the right sizes."""
    passed_over: dict[Path, str] = field(default_factory=dict)
    """The others, and what is wrong with each."""
    unreadable: dict[Path, UnreadableError] = field(default_factory=dict)
    """Those of the others that cannot be read now and may be whole."""

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
