"""Safetensors files: written with their checksum on the way, and read as memory maps. Nothing in them is executed.

A tensor at a time: what is to be written is made when its turn comes.

The format: eight bytes with the length of a header, the header (JSON: name -> dtype, shape, byte range), the data.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from xxhash import xxh3_128

from dsmoe.checkpoint.manifest import BYTES, StoredFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_CHUNK = 1 << 20
"""Bytes that are written at a time: they are still in the processor's cache after the checksum."""


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


def write_items(
    path: Path,
    items: Sequence[Item],
    metadata: dict[str, str] | None = None,
    on_written: Callable[[int], None] = lambda _: None,
) -> tuple[StoredFile, list[int]]:
    """Write a file, one tensor after the other, and force it onto the disk.

    Args:
        path: where.
        items: those of wider elements first, so that all are aligned.
        metadata: what the header says besides.
        on_written: called with the number of bytes of each piece of a tensor that is written.

    Returns:
        The file's size and checksum, and where in it each tensor begins.

    Raises:
        OSError: it cannot be written; with its name.
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
    try:
        checksum = _write(path, start, items, on_written)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # what a write raises does not say where
    return StoredFile(len(start) + end, checksum), [len(start) + begin for begin in begins]


def _write(path: Path, start: bytes, items: Sequence[Item], on_written: Callable[[int], None]) -> str:
    """Write the header and the tensors; the checksum of all of it."""
    checksum = xxh3_128(start)
    with path.open("wb") as stream:
        stream.write(start)
        for item in items:
            tensor = item.make().to(item.dtype).contiguous()
            assert tuple(tensor.shape) == item.shape, f"{item.name}: {tuple(tensor.shape)}, not {item.shape}"
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            for chunk in (data[first : first + _CHUNK] for first in range(0, len(data), _CHUNK)):
                checksum.update(chunk)
                stream.write(chunk)
                on_written(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    return checksum.hexdigest()


def read_tensor(path: Path, dtype: str, shape: Sequence[int], offset: int) -> torch.Tensor:
    """The tensor that begins at byte `offset` of a file.

    It is a map of that part of the file: memory holds what is looked at, until the tensor is gone.
    """
    size = prod(shape) * BYTES[dtype]
    if size == 0:
        return torch.empty(tuple(shape), dtype=DTYPES[dtype])
    before = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        # A private map: torch wants memory that could be written.
        part = mmap.mmap(stream.fileno(), before + size, offset=offset - before, access=mmap.ACCESS_COPY)
    elements = torch.frombuffer(part, dtype=torch.uint8, count=size, offset=before)
    if before % BYTES[dtype]:
        elements = elements.clone()  # other people's files need not be aligned
    return elements.view(DTYPES[dtype]).view(tuple(shape))
