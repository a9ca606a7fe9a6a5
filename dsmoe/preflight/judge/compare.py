"""Comparison of ranks: what is slow beside its like.

What a thing should reach is the median of its like, the upper one of an even number, and it is far off below a fixed
part of that. The median, because one broken device must not move what it is compared with: a mean does, and a maximum
follows one lucky number. A fixed part of it rather than a multiple of the median absolute deviation, because that is
zero where all others are alike, which would call a rank one per cent below them odd, and because it says nothing of two
ranks. A synchronous job goes at the pace of its slowest rank, so the ratio is what that rank costs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsmoe.preflight.judge.verdict import Check, Verdict
from dsmoe.preflight.judge.wording import amount, share, who
from dsmoe.preflight.results import RankReport


@dataclass(frozen=True)
class Limits:
    """Beyond which part of the median something is far off."""

    compute: float
    link: float
    latency: float
    """Most times the median that an exchange of next to nothing may take."""


ON_DEVICES = Limits(compute=0.85, link=0.6, latency=3.0)
ON_HOSTS = Limits(compute=0.5, link=0.15, latency=20.0)
"""A message over gloo waits for a CPU as well, and for whatever else that host does."""


@dataclass(frozen=True)
class Workload:
    """The measured products, messages and storage."""

    sizes: Mapping[str, str]
    """In words, by product or message."""
    groups: Mapping[str, Sequence[Sequence[int]]]
    """The groups of ranks that do each message."""
    checkpoints_gib: float = 0.0
    """GiB that the checkpoints of a run take."""
    free_storage_gib: float = math.inf


def number(value: float | None) -> float:
    """A rate that can be compared: 0 for none, NaN, infinity and what is below zero."""
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def typical(values: Iterable[float]) -> float:
    """The upper median of those that are numbers: of two ranks, the faster one."""
    return statistics.median_high([value for value in map(number, values) if value] or [0.0])


def compare_ranks(
    check: tuple[str, str],
    rates: Mapping[int, float],
    limit: float,
    reports: Sequence[RankReport],
    verdict: Verdict,
    serious: bool = True,
    promised: float | None = None,
    size: str = "",
) -> float:
    """Name the ranks whose rate is below `limit` times the median, or is no number; returns the median.

    Args:
        check: its name and unit.
        rates: by rank; more is better.
        limit: see above.
        reports: of all ranks.
        verdict: is added to.
        serious: whether what is found is.
        promised: for the table.
        size: for the table.
    """
    name, unit = check
    usable = {rank: number(rate) for rank, rate in rates.items()}
    usual = typical(usable.values())
    if silent := [rank for rank, rate in usable.items() if not rate]:
        verdict.say(f"{name}: no number from {who(silent, reports)}: {amount(rates[silent[0]])}", serious)
    if slow := [rank for rank, rate in usable.items() if 0 < rate < limit * usual]:
        rate = min(usable[rank] for rank in slow)
        verdict.say(
            f"{name}: {amount(rate)} {unit} on {who(slow, reports)}, {share(rate, usual)} x the median {amount(usual)}",
            serious,
        )
    worst = min(usable, key=usable.__getitem__)
    where = who([worst], reports) if len(usable) > 1 else ""
    verdict.checks.append(Check(name, unit, usual, usable[worst], where, promised, size))
    return usual
