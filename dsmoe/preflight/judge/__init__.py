"""Judgement of the results: ranks, nodes and links unlike the others or the config's promise; no torch, no timing."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe.preflight.judge.compare import ON_DEVICES, ON_HOSTS, Limits, Workload
from dsmoe.preflight.judge.links import judge_collectives, judge_links
from dsmoe.preflight.judge.sameness import judge_sameness
from dsmoe.preflight.judge.slow_devices import judge_devices, judge_storage
from dsmoe.preflight.judge.verdict import Check, Finding, Verdict
from dsmoe.preflight.judge.wording import who
from dsmoe.preflight.results import Promise, RankReport

__all__ = ["ON_DEVICES", "ON_HOSTS", "Check", "Finding", "Limits", "Verdict", "Workload", "judge"]


def judge(reports: Sequence[RankReport], promise: Promise, limits: Limits, workload: Workload) -> Verdict:
    """Judge what the ranks report, in the order of ranks, all or the first part of it."""
    verdict = Verdict()
    judge_sameness(reports, verdict)
    for report in reports:
        if report.problem:
            verdict.say(f"{who([report.rank], reports)}: {report.problem}")
    judge_devices(reports, promise, limits, workload, verdict)
    judge_storage(reports, workload, verdict)
    judge_links(reports, promise, limits, verdict)
    judge_collectives(reports, limits, workload, verdict)
    verdict.findings.sort(key=lambda finding: not finding.serious)
    return verdict
