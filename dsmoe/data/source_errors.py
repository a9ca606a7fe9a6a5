"""Errors of reading a source: bad records and files, and the translation of readers' errors into messages."""

from __future__ import annotations

import errno
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Source
from dsmoe.plan.text import shown

_LASTING_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Errors of the system that last until somebody changes a path or a permission."""


@dataclass(frozen=True)
class BadRecord:
    """A record without usable text; readers yield it in place of the text and go on with the next record."""

    key: str
    """The key of the source that the problem is about."""
    message: str
    """The file, the line, item or row, and the problem."""
    advice: str = "mend it"
    """The remedy, or empty if `message` says it all."""

    def error(self, source: Source) -> UserError:
        """Return the error that ends the reading if `bad_records` is `refuse`."""
        skip = ", or set `bad_records: skip` to leave such records out and count them"
        return source_error(source, self.key, f"{self.message}; {self.advice}{skip}" if self.advice else self.message)


class BadFileError(Exception):
    """A file that cannot be read as its source says; `key` is the key of the source that the problem is about."""

    def __init__(self, key: str, problem: str):
        super().__init__(key, problem)
        self.key = key
        self.problem = problem


class LostCorpusError(UserError):
    """There is nothing at a source's path."""

    in_cache = ""
    """End of the message: why the cache cannot replace the text."""

    def __str__(self) -> str:
        return super().__str__() + self.in_cache


class LostCopyError(LostCorpusError):
    """There is nothing at a source's path, and its tokens in the cache are damaged."""


def source_error(source: Source, key: str, problem: str, kind: type[UserError] = UserError) -> UserError:
    """Return the error about one key of one source."""
    return kind(f"data.sources[{source.name}].{key}: {shown(problem)}")


@contextmanager
def translated(source: Source, file: Path) -> Iterator[None]:
    """Turn every error of reading `file` into an error that names it.

    Raises:
        UserError: the file is damaged, is not what the source says, or may not be read.
        OSError: the storage failed, perhaps for a short time; with the file's name.
    """
    try:
        yield
    except BadFileError as error:
        raise source_error(source, error.key, error.problem) from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # raised by a library, or by a seek to an impossible place
            raise _damaged(source, file, error) from error
        if error.errno in _LASTING_ERRORS:
            raise source_error(source, "path", f"{shown(file)} cannot be read ({error.strerror})") from error
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error
    except Exception as error:
        if isinstance(error, _errors_of_decoders()):
            raise _damaged(source, file, error) from error
        raise


def _errors_of_decoders() -> tuple[type[Exception], ...]:
    import pyarrow  # imported after an error only, because the import is slow

    # UnicodeDecodeError: a name in the footer of a damaged parquet file. Text that is not UTF-8 is a BadRecord instead.
    return EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, UnicodeDecodeError, pyarrow.ArrowException


def _damaged(source: Source, file: Path, error: Exception) -> UserError:
    detail = " ".join(str(error).split())[:300] or type(error).__name__
    key = "format" if source.format == "parquet" else "path"
    kind = ", or is not a parquet file" if source.format == "parquet" else ""
    return source_error(
        source, key, f"{shown(file)} is cut off or damaged{kind} ({detail}); get it again, or take it out of the corpus"
    )
