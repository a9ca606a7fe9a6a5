"""Node lists: host names as Slurm writes them, `n[01-03,07],m2`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from dsmoe.config.errors import UserError
from dsmoe.runtime.variables import shown

_ENTRY = re.compile(r"(?:\w|\[[\d,-]*\])(?:[\w.:-]|\[[\d,-]*\])*", re.ASCII)
"""An entry of a list, with the commas inside its brackets. No name begins as an option does."""
MAX_HOSTS = 100_000
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand_nodelist(text: str) -> list[str]:
    """Return the host names, in the list's order; of several brackets in one entry, the last varies fastest.

    Raises:
        UserError: the text is no such list.
    """
    # `r[1-2]n[08-10],m2`: two entries, since the commas inside brackets belong to their entry.
    #   r[1-2]n[08-10] is split at its brackets into "r" x (1, 2) x "n" x (08, 09, 10) x ""
    #   a range's numbers are as wide as its first one: 08, 09, 10 and not 8, 9, 10
    #   -> r1n08 r1n09 r1n10 r2n08 r2n09 r2n10, then m2
    entries = _ENTRY.findall(text)
    if not text or ",".join(entries) != text:
        raise _wrong(text)
    names = list(itertools.islice((name for entry in entries for name in _names(entry, text)), MAX_HOSTS + 1))
    if len(names) > MAX_HOSTS:
        raise UserError(f"{shown(text)} is more than {MAX_HOSTS:,} hosts; is a number in it mistyped?")
    return names


def _names(entry: str, text: str) -> Iterator[str]:
    parts = re.split(r"\[(.*?)\]", entry)  # texts in brackets are at odd indices
    choices = [
        [part] if index % 2 == 0 else list(itertools.islice(_numbers(part, text), MAX_HOSTS + 1))
        for index, part in enumerate(parts)
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
