"""Judgement of the results: ranks, nodes and links unlike the others or the config's promise; no torch, no timing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dsmoe.preflight.judge.compare import ON_DEVICES, ON_HOSTS, Limits, Workload
from dsmoe.preflight.judge.links import judge_collectives, judge_links
from dsmoe.preflight.judge.slow_devices import judge_devices, judge_storage
from dsmoe.preflight.judge.verdict import Check, Finding, Verdict
from dsmoe.preflight.judge.wording import who
from dsmoe.preflight.results import Promise, RankReport

__all__ = ["ON_DEVICES", "ON_HOSTS", "Check", "Finding", "Limits", "Verdict", "Workload", "judge"]

CLOCK_SECONDS = 1.0
"""Largest difference of a host's clock from the median."""


def judge(reports: Sequence[RankReport], promise: Promise, limits: Limits, workload: Workload) -> Verdict:
    """Judge what the ranks report, in the order of ranks, all or the first part of it."""
    verdict = Verdict()
    _judge_sameness(reports, verdict)
    for report in reports:
        if report.problem:
            verdict.say(f"{who([report.rank], reports)}: {report.problem}")
    judge_devices(reports, promise, limits, workload, verdict)
    judge_storage(reports, workload, verdict)
    judge_links(reports, promise, limits, verdict)
    judge_collectives(reports, limits, workload, verdict)
    verdict.findings.sort(key=lambda finding: not finding.serious)
    return verdict


def _judge_sameness(reports: Sequence[RankReport], verdict: Verdict) -> None:
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
