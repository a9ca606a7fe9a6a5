"""One source as tokens: where its files are, how many tokens each part has, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe.config.schema import Config
from dsmoe.data.cache_meta import token_file
from dsmoe.data.checksummed_files import TokenFile


@dataclass(frozen=True)
class PreparedSource:
    """The token files of one source. Tokens include the end-of-document tokens; bytes are those of the UTF-8 text."""

    name: str
    weight: float
    folder: Path
    dtype: np.dtype
    train_tokens: int
    train_bytes: int
    validation_tokens: int
    validation_bytes: int
    max_token: int
    """No token is larger."""
    text: str = ""
    """Checksum of the training tokens, and of the held-out ones."""
    tokenizer: str = ""
    """`tokenizer_digest` of what made the tokens."""
    lay: str = ""
    """Where its text was, absolute, if it is lost: the config's path may not tell, beside which file it was."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Ranges of training tokens, in order, that another source of the run holds out: they are not to be trained on."""

    @property
    def validation_bytes_per_token(self) -> float:
        """Bytes of validation text per validation token; nats per token / ln 2 / this is bits per byte."""
        return self.validation_bytes / self.validation_tokens

    @property
    def train(self) -> np.ndarray:
        """The tokens that are trained on, to look at: read-only, unchecked, `[tokens]` of `dtype`.

        A map of the file; where something is `left_out`, a copy of the rest in memory.
        """
        tokens = np.memmap(self.folder / token_file("train"), dtype=self.dtype, mode="r")
        if not self.left_out:
            return tokens
        kept = np.split(tokens, np.array(self.left_out).reshape(-1))[::2]
        return np.concatenate(kept)

    @property
    def validation(self) -> np.memmap:
        """The held-out tokens to look at, read-only, unchecked, `[validation_tokens]` of `dtype`."""
        return np.memmap(self.folder / token_file("validation"), dtype=self.dtype, mode="r")

    @property
    def checksum(self) -> str:
        """Of what is trained on and what is held out."""
        return hashlib.sha256(f"{self.text} {self.left_out}".encode()).hexdigest()[:16]

    @property
    def train_file(self) -> TokenFile:
        """The training tokens, checked wherever they are read."""
        return TokenFile(self.folder / token_file("train"), self.dtype, self.train_tokens, self.max_token)

    @property
    def validation_file(self) -> TokenFile:
        """The held-out tokens, checked wherever they are read."""
        return TokenFile(self.folder / token_file("validation"), self.dtype, self.validation_tokens, self.max_token)


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


def too_short(source: PreparedSource, config: Config) -> list[str]:
    """Say which parts of a source have too little text for one sequence."""
    length = config.train.sequence_length
    problems = []
    for part, tokens, fix in (
        ("training", source.train_tokens, "give it more text, or lower train.sequence_length"),
        (
            "validation",
            source.validation_tokens,
            "give it more text or more than one distinct document, raise data.validation_fraction, "
            "or lower train.sequence_length",
        ),
    ):
        if tokens < length + 1:
            problems.append(
                f"data.sources[{source.name}]: the {part} part has {tokens} tokens, but train.sequence_length "
                f"({length}) + 1 = {length + 1} are needed; {fix}"
            )
    if not problems and not len(Sequences(source.train_tokens, length, source.left_out)):
        problems.append(
            f"data.sources[{source.name}]: other sources hold out all of its {source.train_tokens} training tokens, "
            f"in whole sequences of train.sequence_length ({length}); its text is in another source already: leave it "
            f"out, or set another data.seed"
        )
    return problems
