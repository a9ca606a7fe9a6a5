"""Ranks, nodes and amounts as findings write them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dsmoe.preflight.results import RankReport

SHOWN = 4


def who(ranks: Iterable[int], reports: Sequence[RankReport]) -> str:
    """`rank 3 (host1, device 1)`, `host1 (all of its 8 ranks)`, `host1 (rank 3)` where a node has one."""
    wanted = set(ranks)
    parts = []
    for members in _nodes(reports):
        chosen = [report for report in members if report.rank in wanted]
        if len(chosen) == len(members):
            which = f"all of its {len(members)} ranks" if len(members) > 1 else f"rank {members[0].rank}"
            parts.append(f"{members[0].host} ({which})")
        else:
            parts += [f"rank {report.rank} ({report.host}, device {report.local_rank})" for report in chosen]
    return _few(parts)


def between(ends: tuple[int, int], reports: Sequence[RankReport]) -> str:
    """`host0 - host1`, with the devices where a node has several."""
    first, second = (reports[rank] for rank in ends)
    if first.node == second.node:
        return f"{first.host}, devices {first.local_rank} - {second.local_rank}"
    several = sum(report.node == first.node for report in reports) > 1
    devices = f", devices {first.local_rank} - {second.local_rank}" if several else ""
    return f"{first.host} - {second.host}{devices}"


def amount(value: float) -> str:
    """Three figures, whatever the size: `0.0123`, `4.56`, `789`, `1,230`."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def share(value: float, whole: float) -> str:
    """`0.62`: the value as a share of `whole`."""
    if not whole:
        return "nan"
    return f"{value / whole:.2f}" if value / whole >= 0.1 else f"{value / whole:.2g}"


def _nodes(reports: Sequence[RankReport]) -> list[list[RankReport]]:
    nodes: dict[int, list[RankReport]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report)
    return list(nodes.values())


def _few(parts: Collection[str]) -> str:
    """The first few, and how many more there are."""
    shown, more = list(parts)[:SHOWN], len(parts) - SHOWN
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
