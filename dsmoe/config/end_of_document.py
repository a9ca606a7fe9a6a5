"""Which token of a vocabulary is the end of a document, and what is said where none is. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dsmoe.config.errors import UserError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Of which the first that a tokenizer has is taken, where `data.end_of_document` names none."""
_MOST_CANDIDATES = 10


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
