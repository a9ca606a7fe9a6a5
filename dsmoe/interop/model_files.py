"""Other people's safetensors files, and folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe.checkpoint.headers import read_entries
from dsmoe.checkpoint.safetensors import DTYPES, read_tensor
from dsmoe.config.errors import UserError, system_error
from dsmoe.runtime.atomic_files import publish_folder, sync_folder


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
        entries = read_entries(path)
    except OSError as error:
        raise system_error(f"cannot read {path}: {error.strerror}", error) from None
    except ValueError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    return {name: Slot(path, entry.dtype, entry.shape, entry.offset) for name, entry in entries.items()}


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
        publish_folder(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror:  # the system's; libraries have their own, without
            raise system_error(f"cannot write {error.filename or final}: {error.strerror}", error) from None
        raise
