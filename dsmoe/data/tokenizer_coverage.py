"""How much of a source's text no token stands for, on a sample of its documents, and where that is too much."""

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
"""Of the characters; above, the tokenizer is not one for that text."""
WARNED_SHARE = 0.001
_DOCUMENTS = 16
"""Of each batch of `pack`, which has about a million characters."""
_CHARACTERS = 2000
"""Of each of them."""
_ENOUGH = 10_000
"""Characters that are worth an early word."""
_MOST_NAMED = 5


class Coverage:
    """Look at a few documents of every batch, which their hashes choose, so that the cost is a few percent.

    Args:
        name: of the source, for messages.
        tokenizer: makes the tokens.
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        self._name = name
        self._tokenizer = tokenizer
        self._characters = 0
        self._lost: Counter[str] = Counter()
        self._is_told = False

    def look(self, texts: Sequence[str], hashes: Sequence[int]) -> None:
        """Count in some of the texts, of which these are the hashes; log early what may be refused in the end."""
        pieces = []
        for number, text in heapq.nsmallest(_DOCUMENTS, zip(hashes, texts, strict=True)):
            begin = number % (len(text) - _CHARACTERS) if len(text) > _CHARACTERS else 0
            pieces.append(text[begin : begin + _CHARACTERS])
        for lost in self._tokenizer.lost_characters(pieces):
            self._lost.update(lost)
        self._characters += sum(len("".join(piece.split())) for piece in pieces)
        if not self._is_told and self._characters >= _ENOUGH and self._share > REFUSED_SHARE:
            self._is_told = True  # a source may begin with another language than most of it is in
            logger.warning("so far, %s", self._problem())

    def finish(self) -> None:
        """Log a share that is worth a thought.

        Raises:
            UserError: too much is lost.
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
