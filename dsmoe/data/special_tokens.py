"""Special tokens: the end of a document, and text that spells a special token, which must stay text.

The splitter of the `tokenizers` library can be told to leave special tokens in text alone. Models that look up whole
pieces in their vocabulary still make the special token of text that spells it, such as `</s>` in HTML. So no such piece
may reach the model: after the file's own pre-tokenizer, each literal is cut behind its first character. With `</s>` as
special token,

    "out</s>"    becomes the pieces    "out", "<", "/s>"

of which no model can make `</s>`, and whose text is the same. The rule becomes a part of the tokenizer file, so that an
exported tokenizer has it too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dsmoe.config.errors import UserError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""The usual end-of-document tokens; the first in the vocabulary is used if `data.end_of_document` is null."""
_MOST_CANDIDATES = 10
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""Names of the tokens that stand for a byte in models with `byte_fallback`."""


def end_token(
    vocabulary: Mapping[str, int], end: str | None, where: str, candidates: str = ""
) -> tuple[str, int] | None:
    """Return the end-of-document token as text and number: `end`, else one of the usual names; None without any.

    Args:
        vocabulary: numbers of the tokens by their texts.
        end: `data.end_of_document`.
        where: origin of the vocabulary, for the message.
        candidates: end of the message, from `candidates`.

    Raises:
        UserError: `end` is not in the vocabulary.
    """
    if end is not None and end not in vocabulary:
        raise UserError(f"data.end_of_document ({end!r}) is no token of {where}; set it to one{candidates}")
    names = END_OF_DOCUMENT_NAMES if end is None else (end,)
    return next(((name, vocabulary[name]) for name in names if name in vocabulary), None)


def ordinary_token(end: str, where: str, candidates: str) -> UserError:
    """Return the error for a `data.end_of_document` that ordinary text is encoded as; arguments as in `end_token`."""
    return UserError(
        f"data.end_of_document ({end!r}) is an ordinary token of {where}, which makes it of text, so that documents "
        f"would end within; set it to a special token{candidates}"
    )


def no_end_token(path: str, candidates: str) -> str:
    """Return the message for a `data.tokenizer` at `path` without any of the usual end-of-document tokens."""
    return (
        f"data.tokenizer {path} has none of the usual end-of-document tokens ({', '.join(END_OF_DOCUMENT_NAMES)}), so "
        f"that nothing would separate documents; set data.end_of_document to the token that follows each{candidates}"
    )


def candidates(special: Iterable[str]) -> str:
    """Return the end of these messages that lists special tokens, given by their texts; empty without any."""
    names = sorted(special, key=lambda name: "end" not in name.lower())
    more = ", ..." if len(names) > _MOST_CANDIDATES else ""
    return f", for example of its special tokens: {', '.join(names[:_MOST_CANDIDATES])}{more}" if names else ""


def literals_as_text(content: Mapping[str, Any], end: str | None) -> dict[str, Any]:
    """Change the contents of a tokenizer.json so that no text gives a special token, or `end`.

    Args:
        content: a tokenizer.json that the `tokenizers` library accepts.
        end: the end-of-document token, as text; None if there is none.

    Returns:
        The changed contents; equal to `content` if the model makes no such token of text anyway.
    """
    changed = dict(content)
    added: list[dict[str, Any]] = list(content.get("added_tokens") or [])
    if any(token["content"] == end and not token.get("special") for token in added):
        added = [{**token, "special": True} if token["content"] == end else token for token in added]
        changed["added_tokens"] = added
    literals = {token["content"] for token in added if token.get("special")}
    if end in END_OF_DOCUMENT_NAMES:  # not every file lists it as an added token
        literals.add(end)
    model = content["model"]
    if model.get("byte_fallback"):
        literals |= _BYTE_TOKENS
    literals = {literal for literal in literals & _producible_tokens(model) if len(literal) > 1}
    if literals:
        split = {"type": "Split", "pattern": {"Regex": _first_characters(literals)}}
        existing = content.get("pre_tokenizer")
        if existing and existing.get("type") == "Sequence":
            existing = existing["pretokenizers"]
        else:
            existing = [existing] if existing else []
        splits = [*existing, {**split, "behavior": "Isolated", "invert": False}]
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
    return changed


def _producible_tokens(model: Mapping[str, Any]) -> set[str]:
    """Return the tokens, as text, that the model may make of a piece with the same spelling."""
    vocabulary = model["vocab"]
    if "merges" not in model or model.get("ignore_merges"):
        return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return {first + second.removeprefix(prefix) for first, second in pairs}


def _first_characters(literals: Iterable[str]) -> str:
    """Return a regular expression for the first character of every literal: of `<s>` and `</s>`, `<(?=/s>|s>)`."""
    rest: dict[str, list[str]] = defaultdict(list)
    for literal in sorted(literals):
        rest[literal[0]].append(re.escape(literal[1:]))
    return "|".join(f"{re.escape(first)}(?={'|'.join(ends)})" for first, ends in rest.items())
