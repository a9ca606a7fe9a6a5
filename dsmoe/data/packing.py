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
"""Characters of a document in a message."""


@dataclass(frozen=True)
class Packed:
    """What is in a flat token file, per document."""

    num_tokens: np.ndarray
    """`[documents]` int64: tokens, the end-of-document token included."""
    num_bytes: np.ndarray
    """`[documents]` int64: UTF-8 bytes of the text."""
    hashes: np.ndarray
    """`[documents]` uint64: hash of the text under the seed; equal for texts that differ in what `plain_text` drops."""
    max_token: int
    """The largest token."""


def plain_text(text: str) -> str:
    """What makes two documents the same one: the text without white space at its ends, lines ended by line feeds."""
    return text.strip().replace("\r\n", "\n").replace("\r", "\n")


def document_hash(text: str, seed: int) -> int:
    """64 bits that follow from the document and the seed alone: the same in every source."""
    key = hashlib.sha256(f"document/{seed}".encode()).digest()
    return int.from_bytes(hashlib.blake2b(plain_text(text).encode("utf-8"), digest_size=8, key=key).digest(), "little")


def pack(name: str, texts: Iterable[str], tokenizer: Tokenizer, seed: int, target: Path) -> Packed:
    """Write the tokens of `texts`, each followed by the end-of-document token, to `target`.

    Memory holds one batch of about a million characters (or the largest document), and 24 bytes per document.

    Args:
        name: of the source, for the progress log.
        texts: the documents.
        tokenizer: decides the tokens and their type, `token_dtype(vocab_size)`.
        seed: makes the documents' hashes different from those under another seed.
        target: the file to write.

    Raises:
        UserError: the tokenizer gives a token beyond its own vocabulary, makes the end of a document of text, or loses
            much of the text (`Coverage`).
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
                    raise _ends_within(name, len(hashes) + 1, text, tokenizer)
                hashes.append(document_hash(text, seed))
                byte_counts.append(num_bytes)
                token_counts.append(len(tokens) + len(end_of_document))
                file.write(tokens.tobytes())
                file.write(end_of_document.tobytes())
                max_token = max(max_token, int(tokens.max(initial=0)))
                progress.add(num_bytes, token_counts[-1])
            coverage.look(batch, hashes[-len(batch) :])
            progress.report()
    coverage.finish()
    if max_token >= tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer: it has made token {max_token} of the text of data.sources[{name}], and its vocabulary "
            f"ends at {tokenizer.vocab_size - 1}; give data.tokenizer another file"
        )
    return Packed(np.array(token_counts), np.array(byte_counts), np.array(hashes, dtype=np.uint64), max_token)


def _ends_within(name: str, number: int, text: str, tokenizer: Tokenizer) -> UserError:
    """What is said of a document that has the end of a document in it: it would be two."""
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
        tokens_D: `[documents]` tokens of each document in `flat`.
        chosen_D: `[documents]` bool.
        itemsize: bytes per token.
        target: the file to write.
    """
    offsets = np.concatenate([[0], np.cumsum(tokens_D)]) * itemsize
    # Runs of neighbouring chosen documents are copied together.
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
    """A log line every few seconds, so that hours of tokenising do not look like a hang."""

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
        """Log a line, if it is time."""
        now = time.monotonic()
        if now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        rate = self._bytes / 1e6 / (now - self._start)
        tokens = f", {self._tokens:,} tokens" if self._tokens else ""
        logger.info("%s: %s documents%s so far, %.1f MB/s", self._name, f"{self._documents:,}", tokens, rate)
