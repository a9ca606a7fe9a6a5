"""Write files that are there whole or not at all, also after a power cut, and tell files from pipes. No library.

Everything of dsmoe that replaces a file does it here. What is written next to its final name has a name of its own
(`.config.yaml.5f3a91c2.partial`), so that neither another process nor something left over is ever in the way.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.partial", re.DOTALL)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What file systems answer that cannot force a folder, or a special file, onto the disk."""


class NotAFileError(OSError):
    """Where a file is wanted there is something else, which may keep whoever opens it waiting for ever."""


def check_regular(path: Path) -> None:
    """Check that a path leads to a file and not to a pipe, a socket or a device; opens nothing.

    Raises:
        NotAFileError: to one of those.
        OSError: to a folder or to nothing, or it cannot be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise NotAFileError(errno.EINVAL, f"is {kind}, not a file", str(path))


def not_a_file(error: OSError) -> str:
    """For a message after the path: what `check_regular` has found there."""
    return "is a folder, not a file" if isinstance(error, IsADirectoryError) else str(error.strerror)


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace a file, or make it: after a crash it has the old content or the new one, nothing in between.

    A link is followed, and what it points to is replaced. What is no file (`/dev/stdout`, a pipe) is written to.

    Args:
        path: the file; its folder is there.
        content: all of it, text as UTF-8.
        mode: the permissions of the new file, less the umask.

    Raises:
        OSError: it cannot be written, with its name; what was there is untouched, and nothing is left beside it.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            with path.open("wb") as special:
                special.write(data)
            return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")
    try:
        write_synced(partial, data, mode)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:  # a signal's
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file and force it onto the disk; for files of a folder that gets its name afterwards.

    Raises:
        OSError: it cannot be written; with its name, which what a write raises does not have.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_file(path: Path) -> None:
    """Force what a file has onto the disk, whoever has written it.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Give a folder its name, and force that onto the disk, where all that the folder has is already.

    Raises:
        OSError: the name is taken, by anything but an empty folder, or cannot be given: `partial` is still there; or
            the disk fails, and it is not.
    """
    partial.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk, where its file system can do that.

    Raises:
        OSError: the disk fails; with the folder's name.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # one may write in a folder that one may not read
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what `write_whole` has left there of a process that was killed; whoever calls it writes there alone."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    os.unlink(entry.path)
