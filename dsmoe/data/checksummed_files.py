"""Files with checksums: writing, verifying a whole file, and verifying every part that is read.

Beside each FILE is FILE.sums with the checksum of every 64 KiB of FILE (XXH3 of 64 bits, little-endian). Reading a few
tokens reads and checks the 64 KiB around them, which a disk reads ahead anyway. A FILE of 150,000 bytes:

    bytes of FILE      0 .. 65,535    65,536 .. 131,071    131,072 .. 149,999
    bytes of .sums     0 .. 7         8 .. 15              16 .. 23
    read(70_000, 70_100) reads and checks the second chunk and returns its bytes 4,464 to 4,563.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest, xxh3_128_hexdigest

from dsmoe.config.errors import UserError
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file

CHUNK = 1 << 16
"""Bytes that one checksum covers."""
SPAN = 1 << 24
"""Bytes that one thread verifies at a time."""
THREADS = 8
_SUM = np.dtype("<u8")


class DamagedCacheError(UserError):
    """A file of the cache is not what was written."""

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what
        super().__init__(folder, what)  # unpickling calls the class with these arguments

    def __str__(self) -> str:
        return f"data.cache_dir: {self.folder} is damaged ({self.what}); delete that folder and run again"


@dataclass(frozen=True)
class StoredFile:
    """The size and checksum that a file should have."""

    bytes: int
    xxh128: str
    """Checksum of the file's checksums (FILE.sums)."""


class FileWriter:
    """Sequential writer of a file and of the checksums beside it."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("wb")
        self._sums: list[int] = []
        self._chunk = xxh3_64()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._file.write(data)
        rest = memoryview(data)
        while rest:
            part = rest[: CHUNK - self._bytes % CHUNK]
            self._chunk.update(part)
            self._bytes += len(part)
            rest = rest[len(part) :]
            if self._bytes % CHUNK == 0:
                self._end_chunk()

    def close(self) -> StoredFile:
        """Close the file, write its checksums, and return its size and checksum."""
        if self._bytes % CHUNK:
            self._end_chunk()
        self._file.close()
        sums = np.array(self._sums, dtype=_SUM).tobytes()
        sums_path(self._path).write_bytes(sums)
        return StoredFile(self._bytes, xxh3_128_hexdigest(sums))

    def _end_chunk(self) -> None:
        self._sums.append(self._chunk.intdigest())
        self._chunk.reset()


def write_file(path: Path, data: bytes) -> StoredFile:
    """Write a whole file with its checksums."""
    writer = FileWriter(path)
    writer.write(data)
    return writer.close()


def sums_path(path: Path) -> Path:
    """Return the path of a file's checksums."""
    return path.with_name(f"{path.name}.sums")


class FileReader:
    """Random-access reader of a file that `FileWriter` wrote; checks every chunk that it reads.

    The files are opened at the first read. Nothing is memory-mapped, so a failing disk or network raises an OSError
    that names the file, where a map would end the process with a signal.
    """

    def __init__(self, path: Path, num_bytes: int):
        self._path = path
        self._bytes = num_bytes
        self._descriptors: tuple[int, int] | None = None

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes from `begin` up to `end`.

        Raises:
            DamagedCacheError: the bytes or their checksums are not what was written.
            OSError: the storage failed; with the name of the file.
        """
        assert 0 <= begin <= end <= self._bytes
        first, last = begin // CHUNK, -(-end // CHUNK)
        start = first * CHUNK
        data = self._pread(0, start, min(last * CHUNK, self._bytes) - start)
        sums = np.frombuffer(self._pread(1, first * _SUM.itemsize, (last - first) * _SUM.itemsize), dtype=_SUM)
        for number, expected in enumerate(sums.tolist()):
            if xxh3_64_intdigest(data[number * CHUNK : (number + 1) * CHUNK]) != expected:
                at = (first + number) * CHUNK
                raise self._damaged(f"the 64 KiB of {self._path.name} at byte {at:,} are not what was written")
        return data[begin - start : end - start]

    def _pread(self, which: int, offset: int, size: int) -> memoryview:
        """Read `size` bytes of the file (0) or its checksums (1)."""
        path = (self._path, sums_path(self._path))[which]
        try:
            descriptor = self._opened()[which]
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more  # Linux reads at most 2 GiB in one call
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(error.filename).name} is missing") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if len(data) < size:
            raise self._damaged(f"{path.name} ends at byte {offset + len(data):,}, before its end")
        return memoryview(data)

    def _opened(self) -> tuple[int, int]:
        if self._descriptors is None:
            data = os.open(self._path, os.O_RDONLY)
            weakref.finalize(self, os.close, data)
            sums = os.open(sums_path(self._path), os.O_RDONLY)
            weakref.finalize(self, os.close, sums)
            self._descriptors = (data, sums)
        return self._descriptors

    def _damaged(self, what: str) -> DamagedCacheError:
        return DamagedCacheError(self._path.parent, what)


class TokenFile:
    """The token file of one part of a source; checks all that it reads.

    Args:
        path: the file.
        dtype: type of a token.
        num_tokens: tokens in the file.
        max_token: the largest token.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_tokens: int, max_token: int):
        self._path, self._dtype, self._tokens, self._max_token = path, dtype, num_tokens, max_token
        self._reader = FileReader(path, num_tokens * dtype.itemsize)

    def __len__(self) -> int:
        return self._tokens

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return the tokens from `begin` up to `end`, `[end - begin]` of the file's dtype, read-only.

        Raises:
            DamagedCacheError: the tokens are not what was written.
        """
        size = self._dtype.itemsize
        tokens = np.frombuffer(self._reader.read(begin * size, end * size), dtype=self._dtype)
        if tokens.size and int(tokens.max()) > self._max_token:
            raise DamagedCacheError(
                self._path.parent,
                f"{self._path.name} has a token {int(tokens.max())}, and {self._max_token} is said to be its largest",
            )
        return tokens


def check_size(path: Path, stored: StoredFile) -> None:
    """Check the sizes of a file and of its checksums without reading either.

    Raises:
        DamagedCacheError: a size is not that of what was written.
    """
    for file, size in ((path, stored.bytes), (sums_path(path), -(-stored.bytes // CHUNK) * _SUM.itemsize)):
        try:
            check_regular(file)
            actual = file.stat().st_size
        except FileNotFoundError:
            raise DamagedCacheError(path.parent, f"{file.name} is missing") from None
        except (NotAFileError, IsADirectoryError) as error:
            raise DamagedCacheError(path.parent, f"{file.name} {not_a_file(error)}") from None
        if actual != size:
            raise DamagedCacheError(path.parent, f"{file.name} has {actual:,} bytes, not {size:,}")


def check_sums(path: Path, stored: StoredFile) -> None:
    """Check the checksums of a file against their own checksum.

    Raises:
        DamagedCacheError: the checksums are not what was written.
    """
    if xxh3_128_hexdigest(sums_path(path).read_bytes()) != stored.xxh128:
        raise DamagedCacheError(path.parent, f"{sums_path(path).name} is not what was written")


def spans(num_bytes: int, itemsize: int = 1) -> list[tuple[int, int]]:
    """Return (begin, end) of the pieces of a file of `num_bytes` for `verify`, in items of `itemsize` bytes."""
    return [(begin // itemsize, min(begin + SPAN, num_bytes) // itemsize) for begin in range(0, num_bytes, SPAN)]


def verify(pieces: Iterable[tuple[FileReader | TokenFile, int, int]]) -> None:
    """Read, and so check, the pieces, (file, begin, end) each, in several threads.

    Raises:
        DamagedCacheError: a piece is not what was written.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_read_and_forget, pieces):
            pass


def _read_and_forget(piece: tuple[FileReader | TokenFile, int, int]) -> None:
    file, begin, end = piece
    file.read(begin, end)
