"""The valid values next to an invalid one, for messages that offer a fix."""

from __future__ import annotations

from collections.abc import Iterable


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
