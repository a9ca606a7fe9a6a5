"""Text to token numbers: plain bytes, or a `tokenizers` JSON file."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token number."""
    end_of_document: int | None
    """The token after every document, or None when the vocabulary has none."""
    identity: str
    """Equal for tokenizers that encode alike; part of the cache's fingerprint."""

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into tokens, `[tokens]` of `token_dtype(vocab_size)`, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the smallest little-endian unsigned type that holds every token number: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def load_tokenizer(config: Config) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names.

    Raises:
        UserError: the file is missing or not a tokenizer, or the vocabulary exceeds `model.vocab_size`.
    """
    name = config.data.tokenizer
    tokenizer: Tokenizer = ByteTokenizer() if name == "bytes" else _file_tokenizer(Path(name).expanduser().absolute())
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the vocabulary of data.tokenizer "
            f"{name} ({tokenizer.vocab_size}); set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    return tokenizer


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, and 256 as end of document."""

    vocab_size = 257
    end_of_document: int | None = 256
    identity = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into its bytes, `[bytes]` uint16."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text."""
        return [self.encode(text) for text in texts]


class FileTokenizer:
    """A tokenizer saved by the `tokenizers` library, as in a Hugging Face model's `tokenizer.json`.

    Text that spells a special token (`<|endoftext|>` inside a document) is encoded as ordinary text.

    Raises:
        UserError: `content`, which was read from `path`, is not a tokenizer.
    """

    def __init__(self, path: Path, content: bytes):
        self._tokenizer = _parse(path, content)
        self.identity = f"sha256:{hashlib.sha256(content).hexdigest()}"
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = next((vocabulary[eod] for eod in END_OF_DOCUMENT_NAMES if eod in vocabulary), None)

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into tokens, `[tokens]` uint16 or uint32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=token_dtype(self.vocab_size)) for encoding in encodings]


def _file_tokenizer(path: Path) -> FileTokenizer:
    return _parsed_once(path, _read(path))


@functools.lru_cache(maxsize=1)
def _parsed_once(path: Path, content: bytes) -> FileTokenizer:
    """Every call of `prepare` asks for the same tokenizer, and a large one takes seconds to parse."""
    return FileTokenizer(path, content)


def _read(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    inside = path / "tokenizer.json"
    hint = f"did you mean {inside}?" if inside.is_file() else "give `bytes` or the path of a tokenizer.json"
    raise UserError(f"data.tokenizer: there is no file {path}; {hint}")


def _parse(path: Path, content: bytes) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(
            f"data.tokenizer: {path} is not a JSON file of the `tokenizers` library ({error}); "
            "give `bytes` or the path of a tokenizer.json"
        ) from error
    # A saved tokenizer may cut or pad to a model's context; a corpus needs every token once.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
