"""Lists of host names as Slurm writes them: `n[01-03,07],m2`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from dsmoe.config.errors import UserError
from dsmoe.runtime.variables import shown

_ENTRY = re.compile(r"(?:\w|\[[\d,-]*\])(?:[\w.:-]|\[[\d,-]*\])*", re.ASCII)
"""One entry of a list: the commas inside brackets belong to it. No name begins as an option does."""
MOST_HOSTS = 100_000
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand(text: str) -> list[str]:
    """Return the names, in the list's order; of several brackets in one entry, the last counts fastest.

    A range's numbers are as wide as its first one: `n[08-10]` is n08, n09, n10.

    Raises:
        UserError: the text is no such list.
    """
    entries = _ENTRY.findall(text)
    if not text or ",".join(entries) != text:
        raise _wrong(text)
    names = list(itertools.islice((name for entry in entries for name in _names(entry, text)), MOST_HOSTS + 1))
    if len(names) > MOST_HOSTS:
        raise UserError(f"{shown(text)} is more than {MOST_HOSTS:,} hosts; is a number in it mistyped?")
    return names


def _names(entry: str, text: str) -> Iterator[str]:
    parts = re.split(r"\[(.*?)\]", entry)  # what is in brackets has the odd places
    choices = [
        [part] if place % 2 == 0 else list(itertools.islice(_numbers(part, text), MOST_HOSTS + 1))
        for place, part in enumerate(parts)
    ]
    return map("".join, itertools.product(*choices))


def _numbers(ranges: str, text: str) -> Iterator[str]:
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise _wrong(text)
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}d}"


def _wrong(text: str) -> UserError:
    return UserError(f"{shown(text)} is not a list of hosts; such lists are written n1,n2 or n[01-03,07],m2")
