"""Tokens of one prepared source: its files, their sizes, and the sequences in them."""

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
    """The token files of one source; tokens include the end-of-document tokens, bytes count the UTF-8 text."""

    name: str
    weight: float
    folder: Path
    dtype: np.dtype
    train_tokens: int
    train_bytes: int
    validation_tokens: int
    validation_bytes: int
    max_token: int
    """The largest token of both parts."""
    token_checksums: str = ""
    """Checksums of the training tokens and of the held-out tokens, joined by a slash."""
    tokenizer: str = ""
    """`tokenizer_digest` of the tokenizer that made the tokens."""
    lost_path: str = ""
    """Absolute path of the text if it is lost; the config's relative path does not say relative to which file."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Ranges of training tokens, in order, that another source of the run holds out and that are not trained on."""

    @property
    def validation_bytes_per_token(self) -> float:
        """Bytes of held-out text per held-out token: bits per byte = nats per token / ln 2 / bytes per token."""
        return self.validation_bytes / self.validation_tokens

    @property
    def train(self) -> np.ndarray:
        """The training tokens for inspection: read-only, not verified, `[tokens]` of `dtype`.

        A memory map of the file, or if `left_out` is not empty, a copy in memory without those ranges.
        """
        tokens = np.memmap(self.folder / token_file("train"), dtype=self.dtype, mode="r")
        if not self.left_out:
            return tokens
        kept = np.split(tokens, np.array(self.left_out).reshape(-1))[::2]
        return np.concatenate(kept)

    @property
    def validation(self) -> np.memmap:
        """The held-out tokens for inspection: read-only, not verified, `[validation_tokens]` of `dtype`."""
        return np.memmap(self.folder / token_file("validation"), dtype=self.dtype, mode="r")

    @property
    def checksum(self) -> str:
        """Checksum of the tokens that are trained on and held out, 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.token_checksums} {self.left_out}".encode()).hexdigest()[:16]

    @property
    def train_file(self) -> TokenFile:
        """The training tokens, verified wherever they are read."""
        return TokenFile(self.folder / token_file("train"), self.dtype, self.train_tokens, self.max_token)

    @property
    def validation_file(self) -> TokenFile:
        """The held-out tokens, verified wherever they are read."""
        return TokenFile(self.folder / token_file("validation"), self.dtype, self.validation_tokens, self.max_token)


class Sequences:
    """The sequences of a token file that have no token of the ranges `left_out`, numbered from 0 without gaps.

    A sequence is S + 1 tokens; neighbours overlap by one, so that every token but the first is a target exactly once
    (less than S tokens at the end of the file are in none). A file of 10 tokens with S = 2 and (5, 6) left out:

        place in the file    0        1        2        3
        tokens               0 1 2    2 3 4    4 5 6    6 7 8      (token 9 is in none)
        number               0        1        -        2          place([0, 1, 2]) is [0, 1, 3]

    Args:
        num_tokens: tokens in the file.
        sequence_length: S.
        left_out: ranges of tokens, in order and apart, that no sequence may contain.
    """

    def __init__(self, num_tokens: int, sequence_length: int, left_out: Sequence[tuple[int, int]] = ()):
        length = sequence_length
        in_file = max(0, (num_tokens - 1) // length)
        # Sequence k has the tokens from k * S up to and including (k + 1) * S.
        touched = [
            np.arange(max(0, -(-(begin - length) // length)), (end - 1) // length + 1) for begin, end in left_out
        ]
        excluded = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *touched]))
        excluded = excluded[excluded < in_file]
        self._kept_before = excluded - np.arange(len(excluded))
        self._count = in_file - len(excluded)

    def __len__(self) -> int:
        return self._count

    def place(self, numbers: np.ndarray) -> np.ndarray:
        """Return the places in the file of the sequences with these numbers, in units of sequences, `[...]` int64."""
        return numbers + np.searchsorted(self._kept_before, numbers, side="right")


def too_short(source: PreparedSource, config: Config) -> list[str]:
    """Return a problem for each part of a source that has too little text for one sequence."""
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
