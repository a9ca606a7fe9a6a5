"""Decompression of files, with an error for every cut and every detectable damage."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from dsmoe.data.source_errors import BadFileError, shown

logger = logging.getLogger(__name__)

SUFFIXES = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
    ".zip": "zip",
}
"""Compressions by the suffix of a name, in small letters."""

# Text in UTF-8 begins like none of these except bzip2's, of which all ten bytes are compared, for an empty stream too.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    **{b"BZh%d%s" % (level, rest): "bz2" for level in range(1, 10) for rest in (b"1AY&SY", b"\x17rE8P\x90")},
}
_BUFFER = 1 << 20
_Decoder = lzma.LZMADecompressor | bz2.BZ2Decompressor
_ZIP_MAGIC = b"PK\x03\x04"
_TAR_MAGIC = slice(257, 262), b"ustar"


def contents(file: Path) -> Iterator[tuple[str, io.BufferedReader]]:
    """Yield the name for messages and the decompressed bytes of `file`, or of each file in a zip archive.

    The first bytes decide the compression, else the suffix; for a zip archive, the suffix alone. A stream is valid
    until the next one is requested.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile: the file is cut off, damaged or unreadable;
            raised here or while the stream is read, for `source_errors.translated`.
        BadFileError: a compressed file has no bytes, or an archive has to be unpacked by the user.
    """
    with file.open("rb") as raw:
        start = raw.peek(16)
        codec = next((codec for magic, codec in _MAGIC.items() if start.startswith(magic)), None)
        codec = codec or SUFFIXES.get(file.suffix.lower())
        if codec and not start:
            raise BadFileError("path", f"{shown(file)} is cut off: it is {codec} by its name and has no bytes")
        if codec == "zip":
            yield from _archive(file, raw)
            return
        if start.startswith(_ZIP_MAGIC):  # perhaps an office document, which is full of markup
            raise BadFileError("path", f"{shown(file)} is a zip archive; unpack it, or end its name in .zip")
        with _decompressed(raw, codec) as stream:
            place, magic = _TAR_MAGIC
            if stream.peek(512)[place] == magic:
                raise BadFileError("path", f"{shown(file)} is a tar archive; unpack it")
            yield shown(file), stream


@contextmanager
def _decompressed(raw: io.BufferedReader, codec: str | None) -> Iterator[io.BufferedReader]:
    with ExitStack() as stack:
        if codec is None:
            yield raw
        elif codec == "gzip":
            yield stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER))
        elif codec == "xz":
            yield stack.enter_context(
                io.BufferedReader(_ConcatenatedStreams(raw, lzma.LZMADecompressor, b"\0"), _BUFFER)
            )
        elif codec == "bz2":
            yield stack.enter_context(io.BufferedReader(_ConcatenatedStreams(raw, bz2.BZ2Decompressor), _BUFFER))
        else:
            import pyarrow

            yield stack.enter_context(io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), _BUFFER))


def _archive(file: Path, raw: IO[bytes]) -> Iterator[tuple[str, io.BufferedReader]]:
    with zipfile.ZipFile(raw) as archive:
        hidden = []
        for name, info in _members(file, archive):
            try:
                member = archive.open(info)  # opened even if left out below, because that finds a damaged name
            except (RuntimeError, NotImplementedError) as error:  # a password, or an unknown compression
                detail = f"{shown(file)}: cannot unpack {shown(info.filename)} ({error}); unpack the archive"
                raise BadFileError("path", detail) from error
            if info.is_dir():
                continue
            if any(part.startswith((".", "__MACOSX")) and part != ".." for part in name.split("/")):
                hidden.append(info.filename)
                continue
            stream: io.BufferedReader = io.BufferedReader(cast(io.RawIOBase, member), _BUFFER)
            with stream:
                yield f"{shown(file)}, {shown(name)}", stream
        if hidden:
            logger.info("%s: left out: %s hidden (%s)", shown(file), f"{len(hidden):,}", shown(", ".join(hidden[:2])))


def _members(file: Path, archive: zipfile.ZipFile) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return the members of an archive with their normalized paths, in the order of a walk through its folders.

    Raises:
        BadFileError: two members have the same path, or data precedes the first member.
    """
    members = {posixpath.normpath(info.filename.lstrip("/")): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        names = Counter(posixpath.normpath(info.filename.lstrip("/")) for info in archive.infolist())
        name, count = names.most_common(1)[0]
        detail = (
            f"{shown(file)}: {count} of its files are called {shown(name)}, and unpacking it would leave one of them"
        )
        raise BadFileError("path", f"{detail}; make the archive again with different names")
    if members and min(info.header_offset for info in members.values()) > 0:
        detail = f"{shown(file)}: something stands before its first file, such as another archive that it was joined to"
        raise BadFileError("path", f"{detail}; unpack it")
    return sorted(members.items(), key=lambda member: _walk_order(member[0]))


def _walk_order(name: str) -> list[tuple[bool, str]]:
    """Return a sort key that puts the files of a folder before those of its subfolders, like `datasets`."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


class _ConcatenatedStreams(io.RawIOBase):
    """Reader of the concatenated streams of an xz or bz2 file, of which some may be empty.

    Needed because `lzma.LZMAFile` and `bz2.BZ2File` take a damaged second stream for the end of the file without an
    error, and pyarrow takes a bz2 file with an empty stream for damaged.
    """

    def __init__(self, raw: IO[bytes], new_decoder: Callable[[], _Decoder], padding: bytes = b""):
        self._raw = raw
        self._new_decoder = new_decoder
        self._decoder: _Decoder | None = new_decoder()
        self._padding = padding
        """Bytes that may stand between and after streams."""
        self._pending = b""

    def readable(self) -> bool:
        """Return True, for `io.BufferedReader`."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Decompress up to `len(buffer)` bytes; 0 at the end."""
        while True:
            if self._decoder is None:
                self._pending = self._pending.lstrip(self._padding)
                while not self._pending:
                    if not (more := self._raw.read(_BUFFER)):
                        return 0
                    self._pending = more.lstrip(self._padding)
                self._decoder = self._new_decoder()
            if self._decoder.needs_input and not self._pending:
                self._pending = self._raw.read(_BUFFER)
                if not self._pending:
                    raise EOFError("the file ends inside of a stream")
            data = self._decoder.decompress(self._pending, len(buffer))
            self._pending = b""
            if self._decoder.eof:
                self._pending = self._decoder.unused_data
                self._decoder = None
            if data:
                buffer[: len(data)] = data
                return len(data)
