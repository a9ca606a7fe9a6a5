"""Text for people: counts with a unit or their noun, tables, foreign text on one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

_LONGEST_NAMES, _SHOWN_HOSTS = 80, 3
_UNITS = (("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12))


def readable_count(count: int) -> str:
    """Write a count with one decimal and a unit: `1.2 M`, `46.7 B`; below a thousand exactly."""
    if count < 1000:
        return str(count)
    # The unit is chosen after rounding: 999,960 is "1.0 M", never "1000.0 K".
    unit, size = next((u for u in _UNITS if round(count / u[1], 1) < 1000), _UNITS[-1])
    return f"{count / size:,.1f} {unit}"


def quantity(count: int, noun: str) -> str:
    """Write a count with its noun, in the plural unless it is one: `1 step`, `4,096 tokens`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shown(text: Path | str) -> str:
    """Spell a path or a message on one line and in valid Unicode: what cannot be printed is escaped."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def first_and_last(items: Sequence[object], shown: int = 4) -> list[str]:
    """Write the items, of a long sequence the first few and the last: `0 1 2 ... 63` from 64 of them."""
    texts = [str(item) for item in (items if len(items) <= shown else [*items[: shown - 1], items[-1]])]
    return texts if len(items) <= shown else [*texts[:-1], "...", texts[-1]]


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Write rows of equally many cells under each other, two spaces apart; `align` has `<` or `>` for each column.

    A cell is `shown`: one with line breaks or a terminal's commands in it would be other rows.
    """
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def rank_names(ranks: Sequence[int]) -> str:
    """`ranks 0-2, 5`, in ascending order; where those would fill a line, `1,988 ranks from 8 to 3998`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"
    return names if len(names) <= _LONGEST_NAMES else f"{len(ranks):,} ranks from {ranks[0]} to {ranks[-1]}"


def ranks_on_hosts(hosts: Mapping[int, str]) -> str:
    """`ranks 0-2, 5 on host1, host2`, by each rank's host; of many ranks or hosts their number."""
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(hosts)))
    more = f" and {len(names) - _SHOWN_HOSTS:,} more hosts" if len(names) > _SHOWN_HOSTS else ""
    return f"{rank_names(sorted(hosts))} on {', '.join(names[:_SHOWN_HOSTS])}{more}"
