"""Other people's safetensors files, and output folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dsmoe.checkpoint.headers import TensorEntry, read_entries
from dsmoe.checkpoint.safetensors import read_tensor
from dsmoe.config.errors import UserError, system_error
from dsmoe.runtime.atomic_files import publish_folder, sync_folder


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name; reads the header alone.

    Raises:
        UserError: the file cannot be read, or is not a whole safetensors file.
    """
    try:
        return read_entries(path)
    except OSError as error:
        raise system_error(f"cannot read {path}: {error.strerror}", error) from None
    except ValueError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def read_entry(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor as a map of its part of the file."""
    return read_tensor(entry.path, entry.dtype, entry.shape, entry.offset)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `final` at the end of the block, or is removed if the block fails.

    Raises:
        UserError: `final` is there already, or the folder or something in it cannot be written.
    """
    if final.exists():
        raise UserError(f"{final} is there already; remove it, or give another name")
    partial = final.absolute().with_name(f".{final.name}.partial")
    try:
        if os.path.lexists(partial):  # left by a process that was killed
            shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(partial):  # cannot be removed, which is no reason to fail
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
        if isinstance(error, OSError) and error.strerror:  # the system's; libraries raise OSErrors without it
            raise system_error(f"cannot write {error.filename or final}: {error.strerror}", error) from None
        raise
