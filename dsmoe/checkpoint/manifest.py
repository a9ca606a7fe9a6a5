"""`manifest.json`: what a checkpoint is, and the size and checksum of each of its files. No torch.

A folder is a whole checkpoint exactly if it has a manifest that agrees with its own checksum, and the files that the
manifest lists, as they were written. Whatever else is in the folder is never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from secrets import randbits
from typing import Any

from xxhash import xxh3_128

from dsmoe.checkpoint.facts import ContradictionError, Facts, facts_of
from dsmoe.checkpoint.headers import BYTES, FLOATS, LARGEST, Entry, are_sizes, read_entries
from dsmoe.config.errors import UserError, exit_code_of
from dsmoe.plan.text import shown
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file
from dsmoe.runtime.checksummed_json import has_valid_checksum, json_with_checksum

MANIFEST = "manifest.json"
FORMAT = "dsmoe checkpoint 2"
_FILE_NAME = re.compile(r"rank_\d{5,}_\d{3,}\.safetensors", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_PRIME = (1 << 127) - 1
_TABLES = ("files", "tensors")
_TYPES = {"model": FLOATS, "exp_avg": ("F32",), "exp_avg_sq": ("F32",), "step": ("F32",), "rng": ("U8",)}
"""Which types a tensor may have, by its kind; those of buffers are the model's."""


class DamagedError(UserError):
    """A checkpoint that is not what was written, with the name of the file."""


class UnreadableError(DamagedError):
    """A checkpoint that cannot be read now and may be whole: nothing is made of it until it can."""

    @classmethod
    def of(cls, path: str | Path, error: OSError) -> UnreadableError:
        """That of a file, with the exit code of what the system says."""
        unreadable = cls(f"cannot read {path}: {error.strerror}")
        unreadable.exit_code = exit_code_of(error)
        return unreadable


@dataclass(frozen=True)
class StoredFile:
    """What a file should be."""

    bytes: int
    xxh128: str
    """Checksum of all of it, XXH3 of 128 bits: as `xxhsum -H2` prints it."""


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor, and where its elements are."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    """In bytes, from the beginning of the file."""


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor: the boxes tile it."""

    dtype: str
    """As in safetensors files: `F32`, `BF16`, `U8`."""
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The contents of a `manifest.json`."""

    facts: Facts
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]

    def text(self) -> str:
        """The file's contents, a line per entry."""
        content: dict[str, Any] = {"format": FORMAT, "facts": asdict(self.facts)}
        content["files"] = {name: asdict(file) for name, file in sorted(self.files.items())}
        content["tensors"] = {
            key: [tensor.dtype, tensor.shape, [[box.start, box.shape, box.file, box.offset] for box in tensor.boxes]]
            for key, tensor in sorted(self.tensors.items())
        }
        return _sealed(content)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """That of a folder.

        Raises:
            DamagedError: it is missing, or not what was written.
        """
        path = checkpoint / MANIFEST
        try:
            check_regular(path)
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise DamagedError(f"{path} is of another format: {content.get('format')!r}, not {FORMAT!r}")
            if not has_valid_checksum(text, content, _TABLES):
                raise ValueError
            if content.keys() != {"format", "facts", "files", "tensors", "sha256"}:
                raise ContradictionError(f"its entries are {', '.join(content)}")
            manifest = cls(
                facts_of(content["facts"]),
                {name: _file(name, file) for name, file in content["files"].items()},
                {key: _tensor(key, entry) for key, entry in content["tensors"].items()},
            )
            manifest._check()
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedError(f"{checkpoint} is not a whole checkpoint: {path} is missing") from None
        except (NotAFileError, IsADirectoryError) as error:
            raise DamagedError(f"{checkpoint} is not a whole checkpoint: {path} {not_a_file(error)}") from None
        except OSError as error:
            raise UnreadableError.of(path, error) from None
        except ContradictionError as error:
            raise DamagedError(f"{path} is damaged: {shown(str(error))}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is damaged: it is not what was written") from None
        return manifest

    def bytes_of(self, *kinds: str) -> int:
        """Size of all tensors of these kinds (`model`, `exp_avg`...)."""
        return sum(
            tensor.elements * BYTES[tensor.dtype]
            for key, tensor in self.tensors.items()
            if key.partition("/")[0] in kinds
        )

    def _check(self) -> None:
        """Raise ContradictionError where tensors and files, or weights and moments, do not go together."""
        for key, tensor in self.tensors.items():
            kind, _, name = key.partition("/")
            if kind == "model" and tensor.dtype != "F32" and f"exp_avg/{name}" in self.tensors:
                raise ContradictionError(f"{key} is {tensor.dtype}, and what has moments is saved as F32")
            for box in tensor.boxes:
                if box.file not in self.files:
                    raise ContradictionError(f"{key} is in {box.file!r}, which is none of its files")
                end = box.offset + math.prod(box.shape) * BYTES[tensor.dtype]
                if end > self.files[box.file].bytes:
                    raise ContradictionError(f"{key} ends behind the end of {box.file}")
            if not tiles(tensor.shape, [(box.start, box.shape) for box in tensor.boxes]):
                raise ContradictionError(f"the boxes of {key} do not have every element of it once")


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
            raise UnreadableError.of(path, error) from None
        if size != file.bytes:
            raise DamagedError(f"{path} has {size:,} bytes instead of {file.bytes:,}")


def is_own_file(name: str) -> bool:
    """Whether a checkpoint's file may have this name."""
    return name == MANIFEST or _FILE_NAME.fullmatch(name) is not None


def other_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """The names in the folder that the manifest does not list: of others, and not part of the checkpoint.

    Raises:
        UnreadableError: that cannot be seen now.
    """
    try:
        there = {entry.name for entry in os.scandir(checkpoint)}
    except OSError as error:
        raise UnreadableError.of(checkpoint, error) from None
    return sorted(there - manifest.files.keys() - {MANIFEST})


@dataclass(frozen=True)
class Reading:
    """Who is told what is read: the name of each file, and the number of bytes of each piece of it."""

    on_file: Callable[[str], None] = lambda _: None
    on_piece: Callable[[int], None] = lambda _: None


class _Counted(FileIO):
    """A file that says how many bytes of it are read."""

    on_piece: Callable[[int], None]

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
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
            raise UnreadableError.of(path, error) from None
        if found != manifest.files[name].xxh128:
            raise DamagedError(f"{path} is damaged: it is not what was written")


def check_headers(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check that the files called `names` have the manifest's boxes where it says; reads their headers.

    Raises:
        DamagedError: one has not: other weights would be loaded.
    """
    for name, boxes in _boxes_by_file(manifest, names).items():
        _check_header(checkpoint, name, boxes)


def box_name(key: str, start: Iterable[int]) -> str:
    """The name of a box within its file: `exp_avg/blocks.1.ffn.up.weight[128,0]`, by where it begins."""
    return f"{key}[{','.join(map(str, start))}]"


def _boxes_by_file(manifest: Manifest, names: Iterable[str]) -> dict[str, dict[str, Entry]]:
    """What the manifest says is in each of the files, as their own headers should say it."""
    found: dict[str, dict[str, Entry]] = {name: {} for name in names}
    for key, tensor in manifest.tensors.items():
        for box in tensor.boxes:
            if box.file in found:
                found[box.file][box_name(key, box.start)] = Entry(tensor.dtype, box.shape, box.offset)
    return found


def _check_header(checkpoint: Path, name: str, expected: dict[str, Entry]) -> None:
    """Check that a file has exactly these boxes."""
    try:
        there = read_entries(checkpoint / name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"cannot read {checkpoint / name}: {error.strerror}") from None
    except OSError as error:
        raise UnreadableError.of(checkpoint / name, error) from None
    except ValueError as error:
        raise DamagedError(f"{checkpoint / name} is damaged: it is not a whole safetensors file: {error}") from None
    for box in sorted(expected.keys() | there.keys()):
        if expected.get(box) != there.get(box):
            raise DamagedError(
                f"{checkpoint / MANIFEST} is damaged: {shown(box)} of {name} is {_described(expected.get(box))} there, "
                f"and {_described(there.get(box))} in the file's own header"
            )


def _described(entry: Entry | None) -> str:
    return "not" if entry is None else f"{entry.dtype} {list(entry.shape)} at byte {entry.offset}"


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes, (start, shape) each, cover a tensor of `shape`, every element once.

    In linear time. Give every coordinate a random weight, and an element the product of its coordinates' weights: the
    boxes' elements weigh as much as the tensor's exactly if each is there once, but for a chance of some 2^-120
    (Schwartz 1980, Zippel 1979: two different polynomials seldom agree in a random point). A box weighs the product
    of its sides, and a side is a difference of running sums, of which only those at the ends of boxes are needed.
    For a tensor of 3 x 2, cut behind its first row, with sums 0, a, b along the rows and 0, c along the columns:
    (a - 0) (c - 0) + (b - a) (c - 0) = (b - 0) (c - 0).
    """
    for start, size in boxes:
        if not len(start) == len(size) == len(shape):
            return False
        if any(
            first < 0 or part < 1 or first + part > whole for first, part, whole in zip(start, size, shape, strict=True)
        ):
            return False
    sums: list[dict[int, int]] = [{0: 0} for _ in shape]

    def weight(start: tuple[int, ...], size: tuple[int, ...]) -> int:
        product = 1
        for known, first, part in zip(sums, start, size, strict=True):
            for end in (first, first + part):
                if end not in known:
                    known[end] = randbits(126)
            product = product * (known[first + part] - known[first]) % _PRIME
        return product

    total = sum(weight(start, size) for start, size in boxes) % _PRIME
    return total == weight((0,) * len(shape), shape)


def _file(name: str, entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(**entry)
    if not (_FILE_NAME.fullmatch(name) and are_sizes([file.bytes]) and _CHECKSUM.fullmatch(file.xxh128)):
        raise ContradictionError(f"it has no such file: {name!r} {entry}")
    return file


def _tensor(key: str, entry: list[Any]) -> StoredTensor:
    dtype, shape, boxes = entry
    if dtype not in BYTES or not are_sizes(shape, 1) or math.prod(shape) * BYTES[dtype] >= LARGEST:
        raise ContradictionError(f"no tensor is as {key} is there: {str(dtype)[:20]!r} {str(shape)[:80]}")
    kind = key.partition("/")[0]
    if dtype not in _TYPES.get(kind, BYTES):
        raise ContradictionError(f"{key} is {dtype}, and {kind} is saved as {' or '.join(_TYPES[kind])}")
    for start, size, file, offset in boxes:
        if not (are_sizes(start) and are_sizes(size, 1) and type(file) is str and are_sizes([offset])):
            raise ContradictionError(f"no box is as one of {key} is there: {str([start, size, file, offset])[:100]}")
        if not len(start) == len(size) == len(shape):
            raise ContradictionError(f"a box of {key} has {len(size)} dimensions, and the tensor {len(shape)}")
    stored = tuple(StoredBox(tuple(start), tuple(size), file, offset) for start, size, file, offset in boxes)
    return StoredTensor(dtype, tuple(shape), stored)


def _sealed(content: dict[str, Any]) -> str:
    return json_with_checksum(content, _TABLES)
