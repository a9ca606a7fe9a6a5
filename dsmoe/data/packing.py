"""Packing of documents into one flat file of tokens, and copying of chosen documents out of it, in bounded memory."""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe.config.errors import UserError
from dsmoe.data.checksummed_files import FileWriter, StoredFile
from dsmoe.data.source_errors import shown
from dsmoe.data.tokenizer import Tokenizer, token_dtype
from dsmoe.data.tokenizer_coverage import Coverage

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
COPY_BYTES = 1 << 24
PROGRESS_SECONDS = 5.0
_EXCERPT = 60
"""Characters of a document that a message quotes."""


@dataclass(frozen=True)
class Packed:
    """The contents of a flat token file, per document."""

    num_tokens: np.ndarray
    """`[documents]` int64: tokens, including the end-of-document token."""
    num_bytes: np.ndarray
    """`[documents]` int64: UTF-8 bytes of the text."""
    hashes: np.ndarray
    """`[documents]` uint64: `document_hash` of the text."""
    max_token: int
    """The largest token of all documents."""


def canonical_text(text: str) -> str:
    """Return the text without white space at its ends, with line feeds as line ends: equal for equal documents."""
    return text.strip().replace("\r\n", "\n").replace("\r", "\n")


def document_hash(text: str, seed: int) -> int:
    """Return a 64-bit hash of the `canonical_text` under the seed: the same in every source."""
    key = hashlib.sha256(f"document/{seed}".encode()).digest()
    return int.from_bytes(
        hashlib.blake2b(canonical_text(text).encode("utf-8"), digest_size=8, key=key).digest(), "little"
    )


def pack(name: str, texts: Iterable[str], tokenizer: Tokenizer, seed: int, target: Path) -> Packed:
    """Write the tokens of `texts`, each followed by the end-of-document token, to `target`.

    The documents "ab", "" and "c" as bytes, with 256 as the end of a document:

        target        97 98 256 | 256 | 99 256
        num_tokens    3           1     2
        num_bytes     2           0     1

    Memory holds one batch of about a million characters (or the largest document), and 24 bytes per document.

    Args:
        name: name of the source, for the progress log.
        texts: the documents.
        tokenizer: decides the tokens and their type, `token_dtype(vocab_size)`.
        seed: seed of the documents' hashes.
        target: the file to write.

    Raises:
        UserError: the tokenizer gives a token beyond its own vocabulary, gives the end-of-document token for text, or
            loses too much of the text (`Coverage`).
    """
    token_counts, byte_counts, hashes = array("q"), array("q"), array("Q")
    separator = [] if tokenizer.end_of_document is None else [tokenizer.end_of_document]
    end_of_document = np.array(separator, dtype=token_dtype(tokenizer.vocab_size))
    max_token = max(separator, default=0)
    progress, coverage = Progress(name), Coverage(name, tokenizer)
    with target.open("wb") as file:
        for batch in _batches(texts):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch), strict=True):
                num_bytes = len(text.encode("utf-8"))
                if tokenizer.end_of_document is not None and (tokens == tokenizer.end_of_document).any():
                    raise _end_within_document(name, len(hashes) + 1, text, tokenizer)
                hashes.append(document_hash(text, seed))
                byte_counts.append(num_bytes)
                token_counts.append(len(tokens) + len(end_of_document))
                file.write(tokens.tobytes())
                file.write(end_of_document.tobytes())
                max_token = max(max_token, int(tokens.max(initial=0)))
                progress.add(num_bytes, token_counts[-1])
            coverage.count(batch, hashes[-len(batch) :])
            progress.report()
    coverage.finish()
    if max_token >= tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer: it has made token {max_token} of the text of data.sources[{name}], and its vocabulary "
            f"ends at {tokenizer.vocab_size - 1}; give data.tokenizer another file"
        )
    return Packed(np.array(token_counts), np.array(byte_counts), np.array(hashes, dtype=np.uint64), max_token)


def _end_within_document(name: str, number: int, text: str, tokenizer: Tokenizer) -> UserError:
    """Return the error for a document whose tokens contain the end-of-document token."""
    excerpt = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."
    return UserError(
        f"data.end_of_document: the tokenizer makes {tokenizer.end_text!r}, the token after every document, of text in "
        f"document {number:,} of data.sources[{name}], which begins {shown(excerpt)!r}; set data.end_of_document to a "
        "special token of data.tokenizer that no text gives, or take that document out"
    )


def copy_documents(flat: Path, tokens_D: np.ndarray, chosen_D: np.ndarray, itemsize: int, target: Path) -> StoredFile:
    """Copy the chosen documents of a flat token file to `target`, in order, with checksums.

    Args:
        flat: a file written by `pack`.
        tokens_D: `[documents]` int64: number of tokens of each document in `flat`.
        chosen_D: `[documents]` bool.
        itemsize: bytes per token.
        target: the file to write.
    """
    offsets = np.concatenate([[0], np.cumsum(tokens_D)]) * itemsize
    # Adjacent chosen documents are copied together: chosen 0 1 1 0 1 has the runs (1, 3) and (4, 5).
    runs = np.flatnonzero(np.diff(chosen_D.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    writer = FileWriter(target)
    with flat.open("rb") as source:
        for begin, end in offsets[runs].tolist():
            source.seek(begin)
            for position in range(begin, end, COPY_BYTES):
                writer.write(source.read(min(COPY_BYTES, end - position)))
    return writer.close()


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


class Progress:
    """Log of the progress every `PROGRESS_SECONDS`, so that hours of tokenising do not look like a hang."""

    def __init__(self, name: str):
        self._name = name
        self._documents = self._bytes = self._tokens = 0
        self._start = self._reported = time.monotonic()

    def add(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Count a document."""
        self._documents += 1
        self._bytes += num_bytes
        self._tokens += num_tokens

    def report(self) -> None:
        """Log a line if the last one is `PROGRESS_SECONDS` old."""
        now = time.monotonic()
        if now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        rate = self._bytes / 1e6 / (now - self._start)
        tokens = f", {self._tokens:,} tokens" if self._tokens else ""
        logger.info("%s: %s documents%s so far, %.1f MB/s", self._name, f"{self._documents:,}", tokens, rate)
