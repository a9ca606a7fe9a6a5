"""Tokenizer coverage: the share of a source's characters that no token stands for, on a sample of its documents."""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Sequence

from dsmoe.config.errors import UserError
from dsmoe.data.source_errors import shown
from dsmoe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

REFUSED_SHARE = 0.2
"""Share of lost characters above which the tokenizer is refused."""
WARNED_SHARE = 0.001
"""Share of lost characters above which a warning is logged."""
_SAMPLED_DOCUMENTS = 16
"""Documents sampled from each batch of `pack`, which has about a million characters."""
_SAMPLED_CHARACTERS = 2000
"""Characters sampled from each document."""
_EARLY_WARNING_CHARACTERS = 10_000
"""Characters that have to be counted before an early warning."""
_MOST_NAMED = 5


class Coverage:
    """Coverage of one source, counted on the documents of every batch with the lowest hashes.

    The sample is so small that counting costs a few percent of tokenising.

    Args:
        name: name of the source, for messages.
        tokenizer: the tokenizer of the source.
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        self._name = name
        self._tokenizer = tokenizer
        self._characters = 0
        self._lost: Counter[str] = Counter()
        self._has_warned = False

    def count(self, texts: Sequence[str], hashes: Sequence[int]) -> None:
        """Count in some of the texts, chosen by their `hashes`; warn early if the source may be refused in the end."""
        pieces = []
        for number, text in heapq.nsmallest(_SAMPLED_DOCUMENTS, zip(hashes, texts, strict=True)):
            begin = number % (len(text) - _SAMPLED_CHARACTERS) if len(text) > _SAMPLED_CHARACTERS else 0
            pieces.append(text[begin : begin + _SAMPLED_CHARACTERS])
        for lost in self._tokenizer.lost_characters(pieces):
            self._lost.update(lost)
        self._characters += sum(len("".join(piece.split())) for piece in pieces)
        if not self._has_warned and self._characters >= _EARLY_WARNING_CHARACTERS and self._share > REFUSED_SHARE:
            self._has_warned = True  # a source may begin with another language than most of it is in
            logger.warning("so far, %s", self._problem())

    def finish(self) -> None:
        """Log a warning if the share of lost characters is above `WARNED_SHARE`.

        Raises:
            UserError: the share is above `REFUSED_SHARE`.
        """
        if self._share > REFUSED_SHARE:
            raise UserError(
                f"{self._problem()}, more than {REFUSED_SHARE:.0%}; give data.tokenizer a file that was made for such "
                "text, or one that falls back on bytes"
            )
        if self._share > WARNED_SHARE:
            logger.warning("%s", self._problem())

    @property
    def _share(self) -> float:
        return self._lost.total() / max(1, self._characters)

    def _problem(self) -> str:
        most = ", ".join(f"{shown(character)!r}" for character, _ in self._lost.most_common(_MOST_NAMED))
        return (
            f"data.tokenizer: no token stands for {self._share:.2%} of the characters of data.sources[{self._name}], "
            f"counted in {self._characters:,} of them ({most} most often): they are lost, or unknown to the model"
        )
