"""Slow links, devices, nodes and groups.

A device is worth its *best* link, and a link is blamed only if neither of its ends is: a slow node cannot make its
partners look slow, nor a slow cable both of its ends. A group is blamed only where none of its links explains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe.preflight.judge.compare import Limits, Workload, number, typical
from dsmoe.preflight.judge.verdict import Check, Verdict
from dsmoe.preflight.judge.wording import amount, between, share, who
from dsmoe.preflight.results import Link, Promise, RankReport

MET_GBPS, FAR_GBPS = 0.7, 0.5
"""Shares of the promised rate. A healthy link reaches the first: protocol and routing cost a part of a data sheet's
figure. Only a wrong path (sockets instead of RDMA, one port of two) misses the second."""
MET_US = 2.0
"""Most times the promised latency that a healthy link takes."""

Ends = tuple[int, int]


@dataclass(frozen=True)
class _Links:
    """All links of one kind, and what the `cluster` section calls them."""

    where: str
    key: str
    said: Mapping[Ends, Sequence[Link]]
    """Results of each link, by its ends."""


def judge_links(reports: Sequence[RankReport], promise: Promise, limits: Limits, verdict: Verdict) -> None:
    """Exchanges of two devices of one node, and of two nodes."""
    for near, where, key in ((True, "inside a node", "intra_node"), (False, "between nodes", "inter_node")):
        links = _Links(where, key, _said(reports, near))
        if links.said:
            _rates(reports, links, limits, verdict, getattr(promise, f"{key}_gbps"))
            _latencies(reports, links, limits, verdict, getattr(promise, f"{key}_us"))


def judge_collectives(reports: Sequence[RankReport], limits: Limits, workload: Workload, verdict: Verdict) -> None:
    """The run's own messages, by the groups that do them at the same time."""
    for name in dict.fromkeys(name for report in reports for name in report.collective_gbps):
        groups = workload.groups[name]
        rates = [min(number(reports[rank].collective_gbps.get(name)) for rank in group) for group in groups]
        usual = typical(rates)
        worst = min(range(len(groups)), key=rates.__getitem__)
        where = who(groups[worst], reports) if len(groups) > 1 else ""
        verdict.checks.append(Check(name, "GB/s", usual, rates[worst], where, size=workload.sizes.get(name, "")))
        for group, rate in zip(groups, rates, strict=True):
            if rate < limits.link * usual and not verdict.blamed & set(group):
                verdict.say(
                    f"{name}: {amount(rate)} GB/s in the group of {who(group, reports)}, {share(rate, usual)} x the "
                    f"median group's {amount(usual)}, though none of its links is slow"
                )


def _said(reports: Sequence[RankReport], near: bool) -> dict[Ends, list[Link]]:
    said: dict[Ends, list[Link]] = {}
    for report in reports:
        for link in report.links:
            if (reports[link.peer].node == report.node) == near:
                said.setdefault((min(report.rank, link.peer), max(report.rank, link.peer)), []).append(link)
    return said


def _rates(
    reports: Sequence[RankReport], links: _Links, limits: Limits, verdict: Verdict, promised: float | None
) -> None:
    name = f"link {links.where}"
    rates = {ends: min(number(link.gbps) for link in said) for ends, said in links.said.items()}
    of_rank: dict[int, list[float]] = {}
    for ends, rate in rates.items():
        for rank in ends:
            of_rank.setdefault(rank, []).append(rate)
    best = {rank: max(own) for rank, own in of_rank.items()}
    usual = typical(best.values())
    # Of two that have only each other, nobody can say which it is: then it is the link.
    slow = {rank for rank, rate in best.items() if rate < limits.link * usual and len(of_rank[rank]) > 1}
    if slow:
        rate = max(best[rank] for rank in slow)
        verdict.say(
            f"{name}: {amount(rate)} GB/s at best on {who(slow, reports)}, {share(rate, usual)} x the median "
            f"{amount(usual)}"
        )
    verdict.blamed |= slow
    _slow_links(reports, name, rates, usual, slow, limits, verdict)
    worst = min(rates, key=rates.__getitem__)
    place = between(worst, reports)
    verdict.checks.append(Check(name, "GB/s", usual, rates[worst], place if len(rates) > 1 else "", promised))
    if usual:
        verdict.measured[f"{links.key}_gbps"] = usual
    if promised and usual < MET_GBPS * promised:
        verdict.blamed |= set(best)
        verdict.say(
            f"{name}: {amount(usual)} GB/s {'on ' + place if len(rates) == 1 else 'is the median'}, "
            f"{share(usual, promised)} x what cluster.{links.key}_gbps promises ({amount(promised)}); {MET_GBPS} x or "
            f"more would do",
            serious=usual < FAR_GBPS * promised,
        )


def _slow_links(
    reports: Sequence[RankReport],
    name: str,
    rates: Mapping[Ends, float],
    usual: float,
    slow: set[int],
    limits: Limits,
    verdict: Verdict,
) -> None:
    """Name the links whose ends are not to blame.

    Devices of one node may have links of several kinds: some pairs share a switch, others do not. So where there are
    several nodes, each link inside one is held against that of the same two devices in the others.
    """
    alike: dict[tuple[int, int], list[float]] = {}
    for (a, b), rate in rates.items():
        alike.setdefault((reports[a].local_rank, reports[b].local_rank), []).append(rate)
    for (a, b), rate in rates.items():
        same = alike[reports[a].local_rank, reports[b].local_rank]
        expected = typical(same) if reports[a].node == reports[b].node and len(same) > 1 else usual
        if (not rate or rate < limits.link * expected) and not {a, b} & slow:
            verdict.blamed |= {a, b}
            reached = f"{amount(rate)} GB/s on" if rate else "no number on"
            compared = f", {share(rate, expected)} x the median {amount(expected)}" if rate else ""
            verdict.say(f"{name}: {reached} {between((a, b), reports)}{compared}")


def _latencies(
    reports: Sequence[RankReport], links: _Links, limits: Limits, verdict: Verdict, promised: float | None
) -> None:
    """Never serious: a run's messages are large, and what a slow answer costs shows in their rates."""
    name = f"latency {links.where}"
    times = {ends: max(link.us for link in said) for ends, said in links.said.items()}
    times = {ends: us for ends, us in times.items() if number(us)}
    if not times:
        return
    usual = typical(times.values())
    worst = max(times, key=times.__getitem__)
    place = between(worst, reports)
    verdict.checks.append(Check(name, "us", usual, times[worst], place if len(times) > 1 else "", promised))
    verdict.measured[f"{links.key}_us"] = usual
    if times[worst] > limits.latency * usual:
        verdict.say(
            f"{name}: {amount(times[worst])} us on {place}, {share(times[worst], usual)} x the median {amount(usual)}",
            serious=False,
        )
    if promised and usual > MET_US * promised:
        verdict.say(
            f"{name}: {amount(usual)} us, {share(usual, promised)} x what cluster.{links.key}_us promises "
            f"({amount(promised)})",
            serious=False,
        )
