"""The valid values next to an invalid one, for messages that offer a fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_TYPO = 0.65
"""How alike a word and its misspelling are at least: `k` and `kk` are (0.67); `min` and `max` (0.33) are not."""
_MOST_GUESSES = 5


def divisors_of(number: int) -> list[int]:
    """Return the divisors of `number` in rising order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def neighbours(value: int, valid: list[int]) -> list[int]:
    """Return the valid values next to an invalid one, below and above."""
    return [n for n in valid if n < value][-1:] + [n for n in valid if n > value][:1]


def either(values: Iterable[int]) -> str:
    """Join the values by "or"."""
    return " or ".join(map(str, values))


def nearest_of(value: int, valid: list[int]) -> str:
    """Name the valid values on both sides of `value`."""
    return either(neighbours(value, valid))


def nearest_multiples_of(value: int, unit: int) -> str:
    """Name the multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return either(n for n in (below, below + unit) if n)


def closest_key(name: str, keys: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the key of which `name` is a misspelling, or "".

    Names of several words are alike in most letters where one word is another one and means another thing (`save_every`
    and `eval_every`), so every word has to be one misspelt. Words that have run together are compared as a whole.
    """
    return next((key for key in get_close_matches(name, keys, _MOST_GUESSES, cutoff) if _is_misspelt(name, key)), "")


def _is_misspelt(name: str, key: str) -> bool:
    words, right = name.split("_"), key.split("_")
    if len(words) != len(right):
        return _likeness("".join(words), "".join(right)) >= 0.9
    return all(_likeness(word, other) >= _TYPO for word, other in zip(words, right, strict=True))


def _likeness(word: str, other: str) -> float:
    """From 0 to 1: twice the letters in common, in order, by all letters."""
    return SequenceMatcher(None, word, other).ratio()
