"""Overlap between sources: exclude from training the text of one source that another holds out, by document hash.

Most sources hold out exactly the documents whose hashes are below one limit, so two such sources never disagree. The
exceptions are small sources (`dsmoe.data.validation_split`), whose few exceptional documents are looked up in the
others.

With hashes below 100 held out:

    source A    trains on 70, 200     holds out 30, 150    exceptions: trained_below [70], held_out_above [150]
    source B    trains on 150, 300    holds out 30, 70     no exceptions
    A does not train on 70, which B holds out; B does not train on 150, which A holds out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsmoe.data.checksummed_files import FileReader, StoredFile, write_file

DOCUMENT = np.dtype([("hash", "<u8"), ("begin", "<i8"), ("end", "<i8")])
"""One document of a token file: its hash, and the tokens from `begin` up to `end`."""
_BLOCK_DOCUMENTS = 1 << 16
"""Documents that are read at a time."""
_MOST_SEARCHES = 100
"""The most hashes that are looked up by binary search rather than by reading the whole list."""


def write_documents(path: Path, hashes_D: np.ndarray, num_tokens_D: np.ndarray) -> StoredFile:
    """Write the list of a token file's documents, in the order of their hashes.

    Args:
        path: the file to write.
        hashes_D: `[documents]` uint64, in the order of the token file.
        num_tokens_D: `[documents]` int64 tokens of each document.
    """
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
        """Return the documents at the places from `begin` up to `end`, `[end - begin]` of `DOCUMENT`."""
        size = DOCUMENT.itemsize
        return np.frombuffer(self._reader.read(begin * size, end * size), dtype=DOCUMENT)

    def count_below(self, hash_: int) -> int:
        """Return the number of documents whose hash is below `hash_`, by binary search in the file."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if int(self.rows(middle, middle + 1)["hash"][0]) < hash_:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return all documents with one of the sorted `hashes`, `[found]` of `DOCUMENT`."""
        if len(hashes) == 0 or self._count == 0:
            return np.empty(0, dtype=DOCUMENT)
        found = (
            self._search(hashes)
            if len(hashes) <= _MOST_SEARCHES < self._count // _BLOCK_DOCUMENTS
            else self._scan(hashes)
        )
        return np.concatenate([np.empty(0, dtype=DOCUMENT), *found])

    def _search(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        for hash_ in hashes.tolist():
            yield self.rows(self.count_below(hash_), self.count_below(hash_ + 1))

    def _scan(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, self._count, _BLOCK_DOCUMENTS):
            rows = self.rows(begin, min(begin + _BLOCK_DOCUMENTS, self._count))
            yield rows[np.isin(rows["hash"], hashes)]


class Split:
    """The documents that one source trains on and holds out.

    Args:
        train: the training documents.
        validation: the held-out documents.
        is_cut: both are parts of a single document, which has one hash.
        limit: `hash_limit` of the fraction that is held out.
    """

    def __init__(self, train: Documents, validation: Documents, is_cut: bool, limit: int):
        self.train, self.validation, self.is_cut = train, validation, is_cut
        everything = (0, len(train)), (0, len(validation))
        parts = (
            everything if is_cut else ((0, train.count_below(limit)), (validation.count_below(limit), len(validation)))
        )
        self.trained_below = np.unique(train.rows(*parts[0])["hash"])
        """Hashes that this source trains on and a source without exceptions would hold out."""
        self.held_out_above = np.unique(validation.rows(*parts[1])["hash"])
        """Hashes that this source holds out and a source without exceptions would train on."""

    def trained_but_held_out_by(self, other: Split) -> np.ndarray:
        """Return the training documents of this source that `other` holds out, `[found]` of `DOCUMENT`."""
        if self.is_cut and other.is_cut and self.train.rows(0, 1)["end"] == other.train.rows(0, 1)["end"]:
            return np.empty(0, dtype=DOCUMENT)  # of the same document, both hold out the same end
        held_out = other.validation.find(self.trained_below)["hash"]
        return self.train.find(np.union1d(held_out, other.held_out_above))


def left_out(splits: list[Split]) -> list[list[tuple[int, int]]]:
    """Return, per source, the ranges of its training tokens that another source holds out, in order and apart."""
    return [
        _ranges([split.trained_but_held_out_by(other) for other in splits if other is not split]) for split in splits
    ]


def _ranges(documents: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return the documents' token ranges in order, adjacent ones joined: (3, 5), (0, 3), (7, 9) -> (0, 5), (7, 9)."""
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted({(int(row["begin"]), int(row["end"])) for rows in documents for row in rows}):
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return ranges
