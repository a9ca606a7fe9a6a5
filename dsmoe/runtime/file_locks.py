"""File locks that end with their process (`flock`), and detection of file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
"""Errors of file systems without `flock`: Lustre mounted without `-o flock`, NFS without its lock service."""
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class HeldError(Exception):
    """Another process, on this machine or another, holds the lock and is alive."""


@dataclass
class Lock:
    """An open lock file; the system releases the lock however the process ends."""

    path: Path
    descriptor: int
    works: bool
    """False if the file system has no locks, so that nothing is held."""

    @property
    def is_in_place(self) -> bool:
        """True if the locked file is still the one at its path; the folder may have been removed and made anew."""
        return _is_at(self.descriptor, self.path)

    def release(self) -> None:
        """Release the lock; the file stays."""
        os.close(self.descriptor)


def take(path: Path) -> Lock:
    """Take the lock at `path` without waiting; make the file if necessary, in a folder that exists.

    Child processes forked meanwhile hold the lock too, for as long as they live.

    Raises:
        HeldError: another process holds the lock.
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
        os.close(descriptor)  # the previous holder removed the file between the two calls: try again


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one that is now at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def machine() -> str:
    """Return an id of the running kernel: the same in all containers of a machine, another after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip().replace("-", "")
    except OSError:
        return "unknown"
