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

from dsmoe.config.end_of_document import END_OF_DOCUMENT_NAMES

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""How models with `byte_fallback` call the tokens that stand for a byte."""


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
