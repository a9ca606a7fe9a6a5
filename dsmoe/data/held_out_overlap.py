"""Text that one source holds out and another would train on: found by the documents' hashes, and not trained on.

Most sources hold out exactly the documents whose hashes are below one limit, and two of those cannot disagree. What
remains are the exceptions of small sources (`dsmoe.data.validation_split`): a few documents, looked up in the other
sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsmoe.data.checksummed_files import FileReader, StoredFile, write_file

DOCUMENT = np.dtype([("hash", "<u8"), ("begin", "<i8"), ("end", "<i8")])
"""A document of a token file: its hash, and from which token to which it is."""
_BLOCK = 1 << 16
"""Documents that are looked through at a time."""
_FEW = 100
"""Hashes that are looked up one by one rather than by reading the whole list."""


def write_documents(path: Path, hashes_D: np.ndarray, num_tokens_D: np.ndarray) -> StoredFile:
    """Write the list of a token file's documents, in the order of their hashes."""
    ends = np.cumsum(num_tokens_D)
    documents = np.empty(len(hashes_D), dtype=DOCUMENT)
    documents["hash"], documents["begin"], documents["end"] = hashes_D, ends - num_tokens_D, ends
    return write_file(path, documents[np.argsort(hashes_D, kind="stable")].tobytes())


class Documents:
    """The documents of one part of a source, in the order of their hashes."""

    def __init__(self, path: Path, count: int):
        self._reader = FileReader(path, count * DOCUMENT.itemsize)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Those at the places `begin` to `end`, `[end - begin]` of `DOCUMENT`."""
        size = DOCUMENT.itemsize
        return np.frombuffer(self._reader.read(begin * size, end * size), dtype=DOCUMENT)

    def place(self, hash_: int) -> int:
        """How many have a hash below `hash_`."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if int(self.rows(middle, middle + 1)["hash"][0]) < hash_:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """All that have one of the sorted `hashes`, `[found]` of `DOCUMENT`."""
        if len(hashes) == 0 or self._count == 0:
            return np.empty(0, dtype=DOCUMENT)
        found = self._one_by_one(hashes) if len(hashes) <= _FEW < self._count // _BLOCK else self._all_through(hashes)
        return np.concatenate([np.empty(0, dtype=DOCUMENT), *found])

    def _one_by_one(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        for hash_ in hashes.tolist():
            yield self.rows(self.place(hash_), self.place(hash_ + 1))

    def _all_through(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, self._count, _BLOCK):
            rows = self.rows(begin, min(begin + _BLOCK, self._count))
            yield rows[np.isin(rows["hash"], hashes)]


class Split:
    """What one source trains on and holds out, by document.

    Args:
        train: its training documents.
        validation: its held-out ones.
        is_cut: both are parts of one document, which has one hash.
        limit: `hash_limit` of the fraction that is held out.
    """

    def __init__(self, train: Documents, validation: Documents, is_cut: bool, limit: int):
        self.train, self.validation, self.is_cut = train, validation, is_cut
        everything = (0, len(train)), (0, len(validation))
        parts = everything if is_cut else ((0, train.place(limit)), (validation.place(limit), len(validation)))
        self.trained_below = np.unique(train.rows(*parts[0])["hash"])
        """Hashes of what it trains on and a source without exceptions would hold out."""
        self.held_out_above = np.unique(validation.rows(*parts[1])["hash"])
        """Hashes of what it holds out and a source without exceptions would train on."""

    def trained_of(self, other: Split) -> np.ndarray:
        """The training documents that `other` holds out, `[found]` of `DOCUMENT`."""
        if self.is_cut and other.is_cut and self.train.rows(0, 1)["end"] == other.train.rows(0, 1)["end"]:
            return np.empty(0, dtype=DOCUMENT)  # if they are of one document, both hold out the same end of it
        theirs = other.validation.find(self.trained_below)["hash"]
        return self.train.find(np.union1d(theirs, other.held_out_above))


def left_out(splits: list[Split]) -> list[list[tuple[int, int]]]:
    """By source, the ranges of its training tokens that another source holds out, in order and apart."""
    return [_ranges([here.trained_of(there) for there in splits if there is not here]) for here in splits]


def _ranges(documents: list[np.ndarray]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted({(int(row["begin"]), int(row["end"])) for rows in documents for row in rows}):
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return ranges
