"""Folders of the cache in the making: locked while they are written, removed when nobody writes them any more."""

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


@contextmanager
def in_the_making(folder: Path, name: str) -> Iterator[Path]:
    """Give a new hidden folder beside `folder`, of source `name`, which is removed at the end if it is still there."""
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
    """The file beside a partial folder that is locked while a process writes there."""
    return partial.with_suffix(".lock")


def _remove_orphans(cache_dir: Path, name: str, own: Lock) -> None:
    """Remove the partial folders of source `name` that nobody writes any more.

    The lock of one who was killed is free. Where locks hold among the processes of one machine only, so would be that
    of one who writes on another: there, a folder goes when nothing in it has changed for a day.
    """
    if not own.works:
        logger.warning(
            "data.cache_dir: %s is on a file system without locks (flock): what a killed process leaves there, "
            ".*.partial, is not removed by itself; remove it when nothing prepares a corpus",
            cache_dir,
        )
        _let_datasets_do_without()
        return
    begins = rf"\.{re.escape(name)}-[0-9a-f]{{16}}\."
    there = sorted(cache_dir.iterdir())
    for path in there:
        if re.fullmatch(rf"{begins}[0-9a-f]{{32}}\.lock", path.name) and path != own.path:
            with suppress(HeldError, OSError):  # alive, or another user's
                _remove_if_abandoned(path)
        # An earlier version made none of these locks.
        is_old = re.fullmatch(rf"{begins}.+\.partial", path.name) and not _lock_of(path).exists()
        if is_old and time.time() - _last_change(path) > ABANDONED_SECONDS:
            logger.info("removing %s, in which nothing has changed for a day", path)
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_abandoned(path: Path) -> None:
    """Remove the lock at `path` and the folder that it stands for, if it is free."""
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


def _let_datasets_do_without() -> None:
    """Let `filelock`, through which `datasets` locks folders that are ours alone, pass over locks that are missing.

    It waits for ever where a file system answers EOPNOTSUPP or ENOLCK, and for its own file where it answers ENOSYS.
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
    """When something in the folder was last written, in seconds since 1970."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
