"""Locks that die with their holder: `flock` on a file, and what can be done where a file system has none."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
"""How file systems without `flock` refuse it: Lustre mounted without `-o flock`, NFS without its lock service."""
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class HeldError(Exception):
    """Another process, on this machine or another, holds the lock and is alive."""


@dataclass
class Lock:
    """A lock file that this process has open; the system lets go of it however the process ends."""

    path: Path
    descriptor: int
    works: bool
    """False where the file system has no locks, so that nothing is held."""

    @property
    def is_in_place(self) -> bool:
        """Whether its file is still the one at its path: a folder may have been removed and made anew."""
        return _is_at(self.descriptor, self.path)

    def release(self) -> None:
        """Let go of it; the file stays."""
        os.close(self.descriptor)


def take(path: Path) -> Lock:
    """Take the lock at `path`, a file that is made where there is none in a folder that exists, without waiting.

    Child processes that are forked while it is held hold it too, for as long as they live.

    Raises:
        HeldError: another process has it.
        OSError: the file cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in MISSING:
                return Lock(path, descriptor, works=False)
            os.close(descriptor)
            if error.errno in _HELD:
                raise HeldError(str(path)) from None
            raise OSError(error.errno, error.strerror, str(path)) from None
        if _is_at(descriptor, path):
            return Lock(path, descriptor, works=True)
        os.close(descriptor)  # whoever had it has removed the file between the two calls


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def machine() -> str:
    """Names the running kernel: the same in all containers of a machine, another after it has started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip().replace("-", "")
    except OSError:
        return "unknown"
