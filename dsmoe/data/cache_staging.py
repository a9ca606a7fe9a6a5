"""Partial folders of the cache: locked while a process writes them, removed when their writer is gone."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from dsmoe.runtime.file_locks import MISSING, HeldError, Lock, machine, take

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 86400.0
"""Without a change for so long, a partial folder is removed even where locks do not show whether its writer lives."""


@contextmanager
def partial_folder(folder: Path, name: str) -> Iterator[Path]:
    """Give a new hidden folder beside `folder`, of source `name`; at the end, remove it unless it has been renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    lock = take(_lock_of(partial))
    try:
        os.write(lock.descriptor, machine().encode())
        partial.mkdir()
        _remove_orphans(folder.parent, name, lock)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.path.unlink(missing_ok=True)
        lock.release()


def _lock_of(partial: Path) -> Path:
    """Return the lock file beside a partial folder, which is locked while a process writes the folder."""
    return partial.with_suffix(".lock")


def _remove_orphans(cache_dir: Path, name: str, own: Lock) -> None:
    """Remove the partial folders of source `name` whose writers are gone.

    The lock of a killed process is free. On a file system whose locks hold within one machine only, the lock of a
    living writer on another machine looks free as well: a folder of another machine is removed only when nothing in it
    has changed for a day.
    """
    if not own.works:
        logger.warning(
            "data.cache_dir: %s is on a file system without locks (flock): what a killed process leaves there, "
            ".*.partial, is not removed by itself; remove it when nothing prepares a corpus",
            cache_dir,
        )
        _let_datasets_ignore_missing_locks()
        return
    prefix = rf"\.{re.escape(name)}-[0-9a-f]{{16}}\."
    for path in sorted(cache_dir.iterdir()):
        if re.fullmatch(rf"{prefix}[0-9a-f]{{32}}\.lock", path.name) and path != own.path:
            with suppress(HeldError, OSError):  # its writer lives, or is another user
                _remove_if_abandoned(path)
        # Earlier versions of dsmoe made no lock files.
        is_old = re.fullmatch(rf"{prefix}.+\.partial", path.name) and not _lock_of(path).exists()
        if is_old and time.time() - _last_change(path) > ABANDONED_SECONDS:
            logger.info("removing %s, in which nothing has changed for a day", path)
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_abandoned(path: Path) -> None:
    """Remove the lock file at `path` and its partial folder if the lock is free."""
    lock, partial = take(path), path.with_suffix(".partial")
    try:
        if (
            path.read_text(encoding="utf-8") in (machine(), "")
            or time.time() - _last_change(partial) > ABANDONED_SECONDS
        ):
            if partial.exists():
                logger.info("removing %s, which a process that was killed has left", partial)
            shutil.rmtree(partial, ignore_errors=True)
            path.unlink(missing_ok=True)
    finally:
        lock.release()


def _let_datasets_ignore_missing_locks() -> None:
    """Make `filelock`, with which `datasets` locks folders that only dsmoe uses, ignore missing support for locks.

    Else it waits for ever: for the lock where the file system answers EOPNOTSUPP or ENOLCK, for its own file at ENOSYS.
    """
    from filelock import _unix

    def flock(descriptor: int, operation: int) -> None:
        try:
            fcntl.flock(descriptor, operation)
        except OSError as error:
            if error.errno not in MISSING:
                raise

    _unix.fcntl = SimpleNamespace(**{**vars(fcntl), "flock": flock})  # type: ignore[assignment]


def _last_change(folder: Path) -> float:
    """Return the time of the latest change in the folder, in seconds since 1970."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
