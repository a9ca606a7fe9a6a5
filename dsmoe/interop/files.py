"""Safetensors files, a tensor at a time: what is to be written is made when its turn comes.

A folder is written under another name and renamed when it is whole, so that it is there or it is not.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from dsmoe.checkpoint.files import DTYPES, NAMES, sync_folder
from dsmoe.checkpoint.manifest import BYTES, StoredFile
from dsmoe.config.errors import UserError

_ALIGNMENT = 64
_LONGEST_HEADER = 100_000_000
"""As in the safetensors library: a longer one is no header."""


@dataclass(frozen=True)
class Item:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Gives it, of any dtype; called when it is its turn."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where a tensor is in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """That of its elements."""
        return DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """The tensor, as a map of its part of the file: memory holds what is looked at, until the tensor is gone."""
        size = prod(self.shape) * BYTES[self.dtype]
        if size == 0:
            return torch.empty(self.shape, dtype=self.torch_dtype)
        before = self.offset % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as stream:
            # A private map: torch wants memory that could be written.
            part = mmap.mmap(stream.fileno(), before + size, offset=self.offset - before, access=mmap.ACCESS_COPY)
        elements = torch.frombuffer(part, dtype=torch.uint8, count=size, offset=before)
        if before % BYTES[self.dtype]:
            elements = elements.clone()  # other people's files need not be aligned
        return elements.view(self.torch_dtype).view(self.shape)


def write_items(
    path: Path, items: Sequence[Item], metadata: dict[str, str] | None = None
) -> tuple[StoredFile, list[int]]:
    """Write a file, one tensor after the other, and force it onto the disk.

    Args:
        path: where.
        items: those of wider elements first, so that all are aligned.
        metadata: what the header says besides.

    Returns:
        The file's size and checksum, and where in it each tensor begins.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    begins, end = [], 0
    for item in items:
        begins.append(end)
        end += item.bytes
        header[item.name] = {"dtype": NAMES[item.dtype], "shape": item.shape, "data_offsets": [begins[-1], end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    checksum = hashlib.sha256(start)
    try:
        with path.open("wb") as stream:
            stream.write(start)
            for item in items:
                tensor = item.make().to(item.dtype).contiguous()
                assert tuple(tensor.shape) == item.shape, f"{item.name}: {tuple(tensor.shape)}, not {item.shape}"
                data = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
                checksum.update(data)
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return StoredFile(len(start) + end, checksum.hexdigest()), [len(start) + begin for begin in begins]


def read_header(path: Path) -> dict[str, Slot]:
    """Where the tensors of a file are; reads none of them.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        slots = {name: _slot(path, 8 + length, size, entry) for name, entry in header.items()}
        end = 0
        for first, last in sorted(entry["data_offsets"] for entry in header.values()):
            if first != end:
                raise ValueError("its tensors do not stand one after the other")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"it has {size:,} bytes, and its header describes {8 + length + end:,}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    return slots


def _slot(path: Path, start: int, size: int, entry: dict[str, object]) -> Slot:
    dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])  # type: ignore[attr-defined]
    first, last = (int(offset) for offset in entry["data_offsets"])  # type: ignore[attr-defined]
    if dtype not in DTYPES:
        raise ValueError(f"it has elements of type {dtype}, which is none of {', '.join(DTYPES)}")
    if first < 0 or last - first != prod(shape) * BYTES[dtype] or min(shape, default=0) < 0:
        raise ValueError("its header contradicts itself")
    if start + last > size:
        raise ValueError(f"it has {size:,} bytes, and its header describes {start + last:,} or more")
    return Slot(path, dtype, shape, start + first)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write in that becomes `final` at the end of the block, or is removed if that fails.

    Raises:
        UserError: `final` is there already, or cannot be made.
    """
    if final.exists():
        raise UserError(f"{final} is there already; remove it, or give another name")
    partial = final.absolute().with_name(f".{final.name}.partial")
    try:
        if partial.exists():  # of a process that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {partial}: {error.strerror}") from None
    try:
        yield partial
        sync_folder(partial)
        partial.rename(final)
        sync_folder(partial.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file and force it onto the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
