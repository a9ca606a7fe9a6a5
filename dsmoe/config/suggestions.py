"""Suggestions for messages: the nearest valid values, and the key that a misspelt one means."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_TYPO = 0.65
"""Least likeness of a word and its misspelling: `k` and `kk` have 0.67, `min` and `max` 0.33."""
_MOST_GUESSES = 5


def divisors_of(number: int) -> list[int]:
    """Return the divisors of `number` in rising order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def neighbours(value: int, valid: list[int]) -> list[int]:
    """Return the valid values next to an invalid one, below and above."""
    return [n for n in valid if n < value][-1:] + [n for n in valid if n > value][:1]


def join_or(values: Iterable[int]) -> str:
    """Join the values by "or"."""
    return " or ".join(map(str, values))


def nearest_of(value: int, valid: list[int]) -> str:
    """Name the valid values on both sides of `value`."""
    return join_or(neighbours(value, valid))


def nearest_multiples_of(value: int, unit: int) -> str:
    """Name the multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return join_or(n for n in (below, below + unit) if n)


def closest_key(name: str, keys: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the key of which `name` is a misspelling, or "".

    Names such as `save_every` and `eval_every` share most letters and mean different things, so names are compared word
    by word; names with different numbers of words (`topk` and `top_k`) are compared without the underscores.
    """
    return next((key for key in get_close_matches(name, keys, _MOST_GUESSES, cutoff) if _is_misspelt(name, key)), "")


def _is_misspelt(name: str, key: str) -> bool:
    words, right = name.split("_"), key.split("_")
    if len(words) != len(right):
        return _likeness("".join(words), "".join(right)) >= 0.9
    return all(_likeness(word, other) >= _TYPO for word, other in zip(words, right, strict=True))


def _likeness(word: str, other: str) -> float:
    """Return the likeness from 0 to 1: twice the letters in common, in order, divided by all letters."""
    return SequenceMatcher(None, word, other).ratio()
