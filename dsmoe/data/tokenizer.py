"""Tokenizers: plain bytes, or a JSON file of the `tokenizers` library."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsmoe.config.errors import UserError
from dsmoe.config.paths import unset_variables_note
from dsmoe.config.schema import Config
from dsmoe.config.sections.base import MOST_TOKENS
from dsmoe.data.special_tokens import candidates, end_token, literals_as_text, no_end_token, ordinary_token

_NO_SPACES = str.maketrans("", "", "▁Ġ")
"""Translation that removes the characters which pre-tokenizers write for a space."""


class Tokenizer(Protocol):
    """The interface of a tokenizer to the data pipeline."""

    vocab_size: int
    """One more than the largest token number."""
    end_of_document: int | None
    """The token after every document; None if the vocabulary has none."""
    end_text: str
    """The text of `end_of_document`, for messages; empty if it has none."""
    candidates: str
    """End of a message: special tokens that `data.end_of_document` could name."""
    identity: str
    """Text that is equal for tokenizers that encode alike; part of the cache's fingerprint."""

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into tokens, `[tokens]` of `token_dtype(vocab_size)`, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text."""
        ...

    def lost_characters(self, texts: Sequence[str]) -> list[str]:
        """Return, per text, the characters other than white space that have no token, or only the unknown token."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest little-endian unsigned type that holds every token number: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def load_tokenizer(config: Config) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names.

    Raises:
        UserError: the file is missing or not a tokenizer, or the vocabulary exceeds `model.vocab_size`.
    """
    name, end = config.data.tokenizer, config.data.end_of_document
    if name == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        tokenizer = _file_tokenizer(name, end)
    if tokenizer.vocab_size > MOST_TOKENS:
        raise UserError(
            f"data.tokenizer: {name} has a token of the number {tokenizer.vocab_size - 1}, and a model has at most "
            f"{MOST_TOKENS} tokens; give the file with numbers that count up from 0"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the vocabulary of data.tokenizer "
            f"{name} ({tokenizer.vocab_size}); set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def tokenizer_digest(config: Config) -> str:
    """Return the digest of the contents of `data.tokenizer`: `bytes`, or `sha256:...`; empty if there is no file."""
    if config.data.tokenizer == ByteTokenizer.identity:
        return ByteTokenizer.identity
    path = Path(config.data.tokenizer)
    try:
        return content_digest(path.read_bytes()) if path.is_file() else ""  # reading a pipe would wait for ever
    except OSError:
        return ""


def content_digest(content: bytes) -> str:
    """Return the digest of the contents of a tokenizer's file."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def require_end_of_document(tokenizer: Tokenizer, config: Config) -> None:
    """Check that the tokenizer has an end-of-document token to separate documents.

    Raises:
        UserError: the vocabulary has none of the usual tokens, and `data.end_of_document` is null.
    """
    if tokenizer.end_of_document is None:
        raise UserError(no_end_token(config.data.tokenizer, tokenizer.candidates))


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, and 256 as end of document."""

    vocab_size = 257
    end_of_document: int | None = 256
    end_text = ""
    identity = "bytes"
    candidates = ""

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into its bytes, `[bytes]` uint16."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text."""
        return [self.encode(text) for text in texts]

    def lost_characters(self, texts: Sequence[str]) -> list[str]:
        """Return no characters for any text."""
        return [""] * len(texts)


class FileTokenizer:
    """A tokenizer saved by the `tokenizers` library, as in a Hugging Face model's `tokenizer.json`.

    Text that spells a special token (`<|endoftext|>` inside a document) is encoded as ordinary text, also where the
    model itself would make the token of it (`dsmoe.data.special_tokens`).

    Args:
        path: path of the file.
        content: contents of the file.
        end: the token after every document, as text; None takes the first of the usual ones in the vocabulary.

    Raises:
        UserError: `content` is not a tokenizer, has no token `end`, or encodes ordinary text as the end token.
    """

    def __init__(self, path: Path, content: bytes, end: str | None = None):
        self._path = path
        self._tokenizer = _parse(path, content)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.candidates = candidates(token.content for token in added if token.special)
        token = end_token(vocabulary, end, f"data.tokenizer {path}", self.candidates)
        self.end_of_document = None if token is None else token[1]
        self.end_text = "" if token is None else token[0]
        self.identity = content_digest(content)
        if end is not None:
            self.identity += f" {end}"
        saved = json.loads(content)
        changed = literals_as_text(saved, self.end_text or None)
        if changed != saved:  # earlier versions of dsmoe gave other tokens
            self._tokenizer = _parse(path, json.dumps(changed).encode("utf-8"))
            self.identity += "  literals are text"
        model = changed["model"]
        self._unknown = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))
        self._drops: dict[str, bool] | None = {} if "merges" in model else None
        """True if a BPE model drops a character for want of a token, by character; None for models that drop none."""
        affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
        self._affixes = tuple(affix for affix in affixes if affix)
        if self.end_of_document is not None and self._is_ordinary(self.end_text, self.end_of_document):
            raise ordinary_token(self.end_text, f"data.tokenizer {path}", self.candidates)

    def _is_ordinary(self, token: str, number: int) -> bool:
        """Return whether text is encoded as the token: its own name, or the text of the token (`Ġthe`: " the")."""
        spelled = self._tokenizer.decode([number], skip_special_tokens=False)
        return any(number in tokens for tokens in self.encode_batch([token, spelled, f" {spelled}"]))

    def encode(self, text: str) -> np.ndarray:
        """Turn `text` into tokens, `[tokens]` uint16 or uint32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode every text, on all cores."""
        with _translated(f"data.tokenizer: {self._path} cannot encode the text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=token_dtype(self.vocab_size)) for encoding in encodings]

    def lost_characters(self, texts: Sequence[str]) -> list[str]:
        """Return, per text, the characters other than white space that have no token, or only the unknown token."""
        with _translated(f"data.tokenizer: {self._path} cannot encode the text"):
            if self._drops is not None:
                return ["".join(filter(self._is_dropped, "".join(text.split()))) for text in texts]
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._without_tokens(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _is_dropped(self, character: str) -> bool:
        """Return whether a BPE, which merges characters or bytes, has no token for the character or a byte of it."""
        assert self._drops is not None
        if character not in self._drops:
            tokenizer = self._tokenizer
            text = tokenizer.normalizer.normalize_str(character) if tokenizer.normalizer else character
            split = tokenizer.pre_tokenizer
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)] if split else [text]
            encoding = tokenizer.encode(character, add_special_tokens=False)
            known = "".join(
                self._without_affixes(token)
                for number, token in zip(encoding.ids, encoding.tokens, strict=True)
                if number != self._unknown
            )
            # The space that a pre-tokenizer adds before a text is no character of the text, and may have no token.
            spelled = "".join(pieces)
            self._drops[character] = len(known.translate(_NO_SPACES)) < len(spelled.translate(_NO_SPACES))
        return self._drops[character]

    def _without_affixes(self, token: str) -> str:
        for affix in self._affixes:
            token = token.removeprefix(affix).removesuffix(affix)
        return token

    def _without_tokens(self, text: str, encoding: Any) -> str:
        has_token = [False] * len(text)
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if number != self._unknown:
                has_token[begin:end] = [True] * (end - begin)
        pairs = zip(text, has_token, strict=True)
        return "".join(character for character, has in pairs if not (has or character.isspace()))


def _file_tokenizer(name: str, end: str | None) -> FileTokenizer:
    path = Path(name).absolute()
    return _parsed_once(path, _read(path, unset_variables_note(name)), end)


@functools.lru_cache(maxsize=1)
def _parsed_once(path: Path, content: bytes, end: str | None) -> FileTokenizer:
    """Parse a tokenizer and keep it: every `prepare` needs the same one, and a large one takes seconds to parse."""
    return FileTokenizer(path, content, end)


def _read(path: Path, unset: str) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        inside = path / "tokenizer.json"
        hint = f"did you mean {inside}?" if inside.is_file() else "give `bytes` or the path of a tokenizer.json"
    except OSError as error:
        raise UserError(f"data.tokenizer: {path} cannot be read ({error.strerror})") from error
    raise UserError(f"data.tokenizer: there is no file {path}{unset}; {hint}")


@contextmanager
def _translated(problem: str) -> Iterator[None]:
    """Turn every error of the `tokenizers` library, which has no class of its own, into one that says `problem`."""
    try:
        yield
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # a Rust panic, which is no Exception
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{problem} ({reason}); give `bytes` or the path of a tokenizer.json") from error


def _parse(path: Path, content: bytes) -> Any:
    import tokenizers

    with _translated(f"data.tokenizer: {path} is not a JSON file of the `tokenizers` library"):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # A saved tokenizer may cut or pad to a model's context; a corpus needs every token once.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # a corpus has to be tokenised the same way every time
    return tokenizer
