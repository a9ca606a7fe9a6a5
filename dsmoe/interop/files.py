"""Other people's safetensors files, and folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from dsmoe.checkpoint.files import DTYPES, read_tensor
from dsmoe.checkpoint.manifest import BYTES
from dsmoe.config.errors import UserError, system_error
from dsmoe.durable import sync_folder

_LONGEST_HEADER = 100_000_000
"""As in the safetensors library: a longer one is no header."""


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
        """The tensor, as a map of its part of the file."""
        return read_tensor(self.path, self.dtype, self.shape, self.offset)


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
        raise system_error(f"cannot read {path}: {error.strerror}", error) from None
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
        UserError: `final` is there already, or it or something in it cannot be written.
    """
    if final.exists():
        raise UserError(f"{final} is there already; remove it, or give another name")
    partial = final.absolute().with_name(f".{final.name}.partial")
    try:
        if os.path.lexists(partial):  # of a process that was killed
            shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(partial):  # it cannot be removed, which hinders nobody
            partial = partial.with_name(f"{partial.name}.{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
    except OSError as error:
        raise system_error(f"cannot make {partial}: {error.strerror}", error) from None
    try:
        yield partial
        sync_folder(partial)
        partial.rename(final)
        sync_folder(partial.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror:  # the system's; libraries have their own, without
            raise system_error(f"cannot write {error.filename or final}: {error.strerror}", error) from None
        raise
