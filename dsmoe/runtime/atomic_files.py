"""Atomic files, written whole or not at all, also after a power cut; and a check for regular files.

All code of dsmoe that replaces a file does it here. A partial file has a unique name next to its final one
(`.config.yaml.5f3a91c2.partial`), so that neither another process nor a leftover is in the way. With
the standard library alone.
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
"""Errors of file systems that cannot force a folder, or a special file, onto the disk."""


class NotAFileError(OSError):
    """Something other than a regular file at the path of one; opening it may block for ever."""


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, without opening it.

    Raises:
        NotAFileError: it is a pipe, a socket or a device.
        OSError: it is a folder or missing, or cannot be examined.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise NotAFileError(errno.EINVAL, f"is {kind}, not a file", str(path))


def not_a_file(error: OSError) -> str:
    """Return the part of a message after the path, for an error of `check_regular`."""
    return "is a folder, not a file" if isinstance(error, IsADirectoryError) else str(error.strerror)


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace or make a file: after a crash, it has the old content or the new one, nothing in between.

    A link is followed, and its target replaced. A special file (`/dev/stdout`, a pipe) is written to.

    Args:
        path: the file; its folder must exist.
        content: the whole content, text as UTF-8.
        mode: the permissions of the new file, less the umask.

    Raises:
        OSError: the file cannot be written; with its name. The old file is untouched, and no partial file is left.
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
    except BaseException:  # from a signal handler
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file and force it onto the disk; for files of a folder that is published afterwards.

    Raises:
        OSError: the file cannot be written; with its name, which the error of `write` lacks.
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
    """Force a file's content onto the disk, also if another process has written it.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Rename a folder, whose files are on the disk already, and force the new name onto the disk.

    Raises:
        OSError: the name is taken, by anything but an empty folder, or cannot be given, and `partial` still exists; or
            the disk fails, and `partial` does not exist any more.
    """
    partial.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk, if its file system can.

    Raises:
        OSError: the disk fails; with the folder's name.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # a folder may be writable and not readable
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed processes; no other process may write into the folder meanwhile."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    os.unlink(entry.path)
