"""Safetensors files: written together with their checksum, and read as memory maps. Nothing in them is executed.

One tensor is in memory at a time: each is made when its turn to be written comes.

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

from dsmoe.checkpoint.headers import BYTES
from dsmoe.checkpoint.manifest import StoredFile

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
"""Bytes written at a time: few enough to be in the processor's cache still, when the checksum has read them."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written, which is made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Returns the tensor, of any dtype."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    tensors: Sequence[LazyTensor],
    metadata: dict[str, str] | None = None,
    on_written: Callable[[int], None] = lambda _: None,
) -> tuple[StoredFile, list[int]]:
    """Write a file, one tensor after the other, and force it onto the disk.

    Args:
        path: of the file.
        tensors: those of wider elements first, so that all are aligned.
        metadata: entry `__metadata__` of the header.
        on_written: called with the number of bytes of each piece of a tensor that is written.

    Returns:
        The file's size and checksum, and for each tensor its offset in bytes from the beginning of the file.

    Raises:
        OSError: the file cannot be written; with its name.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    begins, end = [], 0
    for tensor in tensors:
        # Offsets in the header are relative to the data; the header's own length is known when it is complete.
        begins.append(end)
        end += tensor.bytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begins[-1], end]}
    text = json.dumps(header).encode()
    # Spaces are legal JSON: the data begin at a multiple of the alignment, which maps and views as other types need.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    try:
        checksum = _write(path, start, tensors, on_written)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # what a write raises does not say where
    return StoredFile(len(start) + end, checksum), [len(start) + begin for begin in begins]


def _write(path: Path, start: bytes, tensors: Sequence[LazyTensor], on_written: Callable[[int], None]) -> str:
    """Write the header and the tensors, and return the checksum of the whole file."""
    checksum = xxh3_128(start)
    with path.open("wb") as stream:
        stream.write(start)
        for tensor in tensors:
            # Contiguous, since the bytes are hashed and written from the tensor's own memory.
            made = tensor.make().to(tensor.dtype).contiguous()
            assert tuple(made.shape) == tensor.shape, f"{tensor.name}: {tuple(made.shape)}, not {tensor.shape}"
            data = memoryview(made.view(-1).view(torch.uint8).numpy().data)
            for chunk in (data[first : first + _CHUNK] for first in range(0, len(data), _CHUNK)):
                checksum.update(chunk)
                stream.write(chunk)
                on_written(len(chunk))
        stream.flush()
        # Or a power cut after the folder's rename would leave a checkpoint's name with missing contents.
        os.fsync(stream.fileno())
    return checksum.hexdigest()


def read_tensor(path: Path, dtype: str, shape: Sequence[int], offset: int) -> torch.Tensor:
    """Return the tensor at byte `offset` of a file, as a memory map.

    Memory holds the pages that are looked at, until the tensor is freed.
    """
    size = prod(shape) * BYTES[dtype]
    if size == 0:
        return torch.empty(tuple(shape), dtype=DTYPES[dtype])
    # A map begins at a multiple of the granularity (a page): some bytes before the tensor are mapped as well.
    before = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        # A private, copy-on-write map: torch wants memory that could be written.
        part = mmap.mmap(stream.fileno(), before + size, offset=offset - before, access=mmap.ACCESS_COPY)
    elements = torch.frombuffer(part, dtype=torch.uint8, count=size, offset=before)
    if before % BYTES[dtype]:
        elements = elements.clone()  # a view as another dtype needs alignment, which other people's files may lack
    return elements.view(DTYPES[dtype]).view(tuple(shape))
