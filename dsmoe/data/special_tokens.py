"""Text that spells a special token, such as `</s>` in HTML, stays text for a `tokenizers` JSON file.

The library's splitter can be told to leave special tokens in text alone. Models that look up whole pieces in their
vocabulary make the token of such text all the same. So no such piece may reach the model: after the file's own
pre-tokenizer, each literal is cut behind its first character. With `</s>` as special token,

    "out</s>"    becomes the pieces    "out", "<", "/s>"

of which no model can make `</s>`, and whose text is the same. The rule becomes a part of the file, so that an exported
tokenizer has it too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dsmoe.config.errors import UserError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Of which the first that a tokenizer has is taken, where `data.end_of_document` names none."""
_MOST_CANDIDATES = 10
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""How models with `byte_fallback` call the tokens that stand for a byte."""


def end_token(
    vocabulary: Mapping[str, int], end: str | None, where: str, candidates: str = ""
) -> tuple[str, int] | None:
    """The token after every document, as text and number: `end`, or one of the usual names; None where there is none.

    Raises:
        UserError: `end`, which is data.end_of_document, is not in the vocabulary; with `where` that is from.
    """
    if end is not None and end not in vocabulary:
        raise UserError(f"data.end_of_document ({end!r}) is no token of {where}; set it to one{candidates}")
    names = END_OF_DOCUMENT_NAMES if end is None else (end,)
    return next(((name, vocabulary[name]) for name in names if name in vocabulary), None)


def ordinary_token(end: str, where: str, candidates: str) -> UserError:
    """What is said of an `end` that text gives: `where` it is a token, and what may be meant."""
    return UserError(
        f"data.end_of_document ({end!r}) is an ordinary token of {where}, which makes it of text, so that documents "
        f"would end within; set it to a special token{candidates}"
    )


def no_end_token(path: str, candidates: str) -> str:
    """What is said of a vocabulary, of `data.tokenizer`, without a token of the usual names."""
    return (
        f"data.tokenizer {path} has none of the usual end-of-document tokens ({', '.join(END_OF_DOCUMENT_NAMES)}), so "
        f"that nothing would separate documents; set data.end_of_document to the token that follows each{candidates}"
    )


def candidates(special: Iterable[str]) -> str:
    """For these messages: which of the special tokens, by their texts, may be meant; empty where there are none."""
    names = sorted(special, key=lambda name: "end" not in name.lower())
    more = ", ..." if len(names) > _MOST_CANDIDATES else ""
    return f", for example of its special tokens: {', '.join(names[:_MOST_CANDIDATES])}{more}" if names else ""


def literals_as_text(content: Mapping[str, Any], end: str | None) -> dict[str, Any]:
    """Change the contents of a tokenizer.json so that no text gives a special token, or `end`.

    Args:
        content: valid for the `tokenizers` library.
        end: the token after every document, as text; None where there is none.

    Returns:
        The same contents where the model makes no such token of text anyway.
    """
    changed = dict(content)
    added: list[dict[str, Any]] = list(content.get("added_tokens") or [])
    if any(token["content"] == end and not token.get("special") for token in added):
        added = [{**token, "special": True} if token["content"] == end else token for token in added]
        changed["added_tokens"] = added
    literals = {token["content"] for token in added if token.get("special")}
    if end in END_OF_DOCUMENT_NAMES:  # not every file lists them as added tokens
        literals.add(end)
    model = content["model"]
    if model.get("byte_fallback"):
        literals |= _BYTES
    literals = {literal for literal in literals & _made_of_text(model) if len(literal) > 1}
    if literals:
        split = {"type": "Split", "pattern": {"Regex": _first_characters(literals)}}
        own = content.get("pre_tokenizer")
        own = own["pretokenizers"] if own and own.get("type") == "Sequence" else [own] if own else []
        splits = [*own, {**split, "behavior": "Isolated", "invert": False}]
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
    return changed


def _made_of_text(model: Mapping[str, Any]) -> set[str]:
    """The tokens, as text, that the model may make of a piece that is spelled so."""
    vocabulary = model["vocab"]
    if "merges" not in model or model.get("ignore_merges"):
        return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return {first + second.removeprefix(prefix) for first, second in pairs}


def _first_characters(literals: Iterable[str]) -> str:
    """A regular expression for the first character of every literal, wherever the literal begins: `<(?=/s>|s>)`."""
    rest: dict[str, list[str]] = defaultdict(list)
    for literal in sorted(literals):
        rest[literal[0]].append(re.escape(literal[1:]))
    return "|".join(f"{re.escape(first)}(?={'|'.join(ends)})" for first, ends in rest.items())
