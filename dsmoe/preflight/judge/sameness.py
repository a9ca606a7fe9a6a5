"""Are the ranks the same program, on hosts that are what the topology takes them for? No numbers are compared here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dsmoe.preflight.judge.verdict import Verdict
from dsmoe.preflight.judge.wording import who
from dsmoe.preflight.results import RankReport

CLOCK_SECONDS = 1.0


def judge_sameness(reports: Sequence[RankReport], verdict: Verdict) -> None:
    """Versions and config text (serious), steering variables and clocks (not), and which hosts the nodes are."""
    for what in reports[0].versions:
        values = {report.rank: report.versions.get(what, "unknown") for report in reports}
        _compare(what, values, reports, verdict, serious=True)
    for key in sorted({key for report in reports for key in report.environment}):
        values = {report.rank: report.environment.get(key, "not set") for report in reports}
        _compare(key, values, reports, verdict, serious=False)
    _hosts(reports, verdict)
    usual = statistics.median(report.clock for report in reports)
    for report in reports:
        if report.local_rank == 0 and abs(report.clock - usual) > CLOCK_SECONDS:
            verdict.say(f"clock: {report.host} is {report.clock - usual:+.1f} s off the median", serious=False)


def _compare(
    what: str, values: Mapping[int, str], reports: Sequence[RankReport], verdict: Verdict, serious: bool
) -> None:
    """Say who has which value, the fewest first, for they are the odd ones."""
    parties: dict[str, list[int]] = {}
    for rank, value in values.items():
        parties.setdefault(value, []).append(rank)
    if len(parties) > 1:
        sides = sorted(parties.items(), key=lambda party: len(party[1]))
        text = "; ".join(f"{value} on {who(ranks, reports)}" for value, ranks in sides)
        verdict.say(f"{what} differs: {text}", serious)


def _hosts(reports: Sequence[RankReport], verdict: Verdict) -> None:
    hosts: dict[int, list[str]] = {}
    for report in reports:
        hosts.setdefault(report.node, []).append(report.host)
    for node, names in hosts.items():
        if len(set(names)) > 1:
            verdict.say(
                f"ranks: those of node {node} are on {', '.join(dict.fromkeys(names))}; the launcher must start "
                f"cluster.devices_per_node = {len(names)} consecutive ranks on each host"
            )
    first: dict[str, int] = {}
    for node, names in hosts.items():
        if first.setdefault(names[0], node) != node:
            verdict.say(f"ranks: nodes {first[names[0]]} and {node} are both on {names[0]}", serious=False)
