"""Which sequences a token file has: all that have no token of the ranges that are left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Sequences:
    """The sequences of a file, numbered from 0 without gaps.

    A sequence is S + 1 tokens; neighbours overlap by one, so that every token but the first is a target exactly once
    (less than S tokens at the end of the file are in none).

    Args:
        num_tokens: of the file.
        sequence_length: S.
        left_out: ranges of tokens, in order and apart, that no sequence may touch.
    """

    def __init__(self, num_tokens: int, sequence_length: int, left_out: Sequence[tuple[int, int]] = ()):
        length = sequence_length
        whole = max(0, (num_tokens - 1) // length)
        # Sequence k has the tokens from k * S to (k + 1) * S, that one included.
        touched = [
            np.arange(max(0, -(-(begin - length) // length)), (end - 1) // length + 1) for begin, end in left_out
        ]
        gone = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *touched]))
        gone = gone[gone < whole]
        self._kept_before = gone - np.arange(len(gone))
        self._count = whole - len(gone)

    def __len__(self) -> int:
        return self._count

    def place(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the file the sequences with these numbers begin, in sequences, `[...]` int64."""
        return numbers + np.searchsorted(self._kept_before, numbers, side="right")
