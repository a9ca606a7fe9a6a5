"""Safetensors files: written with their checksum on the way, and read as memory maps. Nothing in them is executed.

The format: eight bytes with the length of a header, the header (JSON: name -> dtype, shape, byte range), the data.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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
_CHUNK = 1 << 24
_SMALL = 1 << 16


def write_tensors(path: Path, tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[StoredFile, list[int]]:
    """Write a file and force it onto the disk.

    Args:
        path: where.
        tensors: names and contiguous tensors on the CPU; those of wider elements first, so that all are aligned.

    Returns:
        The file's size and checksum, and where in it each tensor begins.
    """
    header: dict[str, object] = {}
    begins, end = [], 0
    for name, tensor in tensors:
        begins.append(end)
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begins[-1], end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    checksum = hashlib.sha256(start)
    try:
        _write(path, start, [tensor for _, tensor in tensors], checksum)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # what a write raises does not say where
    return StoredFile(len(start) + end, checksum.hexdigest()), [len(start) + begin for begin in begins]


def _write(path: Path, start: bytes, tensors: Sequence[torch.Tensor], checksum: hashlib._Hash) -> None:
    # Most time goes into the checksum and into the copy to the system's cache: they go side by side.
    with path.open("wb") as stream, ThreadPoolExecutor(1) as other:
        stream.write(start)
        for tensor in tensors:
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            for chunk in (data[first : first + _CHUNK] for first in range(0, len(data), _CHUNK)):
                if len(chunk) < _SMALL:
                    checksum.update(chunk)
                    stream.write(chunk)
                    continue
                done = other.submit(checksum.update, chunk)
                stream.write(chunk)
                done.result()
        stream.flush()
        os.fsync(stream.fileno())


class MappedFile:
    """The bytes of a file as tensors, read when they are looked at."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            # A private map: torch wants memory that could be written.
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, dtype: str, shape: Sequence[int], offset: int) -> torch.Tensor:
        """The tensor that begins at byte `offset`; keeps the map alive."""
        count = torch.Size(shape).numel()
        assert offset % BYTES[dtype] == 0
        return torch.frombuffer(self._bytes, dtype=DTYPES[dtype], count=count, offset=offset).view(torch.Size(shape))


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
