"""One source as tokens: where its files are, how many tokens each part has, and how they are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe.data.meta import token_file
from dsmoe.data.stored import TokenFile


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
