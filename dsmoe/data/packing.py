"""Documents to one flat file of tokens, and slices of it to others, in bounded memory."""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe.data.tokenizer import Tokenizer, token_dtype

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
COPY_BYTES = 1 << 24
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Packed:
    """What is in a flat token file, per document."""

    num_tokens: np.ndarray
    """`[documents]` int64: tokens, the end-of-document token included."""
    num_bytes: np.ndarray
    """`[documents]` int64: UTF-8 bytes of the text."""
    hashes: np.ndarray
    """`[documents]` uint64: hash of the text under the salt."""


def pack(name: str, texts: Iterable[str], tokenizer: Tokenizer, salt: str, target: Path) -> Packed:
    """Write the tokens of `texts`, each followed by the end-of-document token, to `target`.

    Memory holds one batch of about a million characters (or the largest document), and 24 bytes per document.

    Args:
        name: of the source, for the progress log.
        texts: the documents.
        tokenizer: decides the tokens and their type, `token_dtype(vocab_size)`.
        salt: makes the documents' hashes different from those under another salt.
        target: the file to write.
    """
    token_counts, byte_counts, hashes = array("q"), array("q"), array("Q")
    hash_key = hashlib.sha256(salt.encode("utf-8")).digest()
    separator = [] if tokenizer.end_of_document is None else [tokenizer.end_of_document]
    end_of_document = np.array(separator, dtype=token_dtype(tokenizer.vocab_size))
    progress = _Progress(name)
    with target.open("wb") as file:
        for batch in _batches(texts):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch), strict=True):
                data = text.encode("utf-8")
                digest = hashlib.blake2b(data, digest_size=8, key=hash_key).digest()
                hashes.append(int.from_bytes(digest, "little"))
                byte_counts.append(len(data))
                token_counts.append(len(tokens) + len(end_of_document))
                file.write(tokens.tobytes())
                file.write(end_of_document.tobytes())
                progress.add(len(data), token_counts[-1])
            progress.report()
    return Packed(np.array(token_counts), np.array(byte_counts), np.array(hashes, dtype=np.uint64))


def copy_documents(flat: Path, tokens_D: np.ndarray, chosen_D: np.ndarray, itemsize: int, target: Path) -> None:
    """Copy the chosen documents of a flat token file to `target`, in order.

    Args:
        flat: a file written by `pack`.
        tokens_D: `[documents]` tokens of each document in `flat`.
        chosen_D: `[documents]` bool.
        itemsize: bytes per token.
        target: the file to write.
    """
    offsets = np.concatenate([[0], np.cumsum(tokens_D)]) * itemsize
    # Runs of neighbouring chosen documents are copied together.
    runs = np.flatnonzero(np.diff(chosen_D.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    with flat.open("rb") as source, target.open("wb") as file:
        for begin, end in offsets[runs].tolist():
            source.seek(begin)
            for position in range(begin, end, COPY_BYTES):
                file.write(source.read(min(COPY_BYTES, end - position)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Progress:
    """A log line every few seconds, so that hours of tokenising do not look like a hang."""

    def __init__(self, name: str):
        self._name = name
        self._documents = self._bytes = self._tokens = 0
        self._start = self._reported = time.monotonic()

    def add(self, num_bytes: int, num_tokens: int) -> None:
        self._documents += 1
        self._bytes += num_bytes
        self._tokens += num_tokens

    def report(self) -> None:
        now = time.monotonic()
        if now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        rate = self._bytes / 1e6 / (now - self._start)
        logger.info(
            "%s: %s documents, %s tokens so far, %.1f MB/s",
            self._name,
            f"{self._documents:,}",
            f"{self._tokens:,}",
            rate,
        )
