"""Devices and the run folder: memory, products, copies, writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsmoe.preflight.judge.compare import Limits, Workload, compare_ranks, number, typical
from dsmoe.preflight.judge.verdict import Verdict
from dsmoe.preflight.judge.wording import amount, share, who
from dsmoe.preflight.results import SQUARE, Promise, RankReport

MET_TFLOPS, FAR_TFLOPS = 0.5, 0.3
"""Shares of the data sheet's peak: a healthy device reaches the first; a wrong or broken one misses the second."""
CHECKSUM_TOLERANCE = 1e-3
MEMORY_SHARE, FREE_SHARE = 0.97, 0.9
STORAGE_SHARE = 0.25


def judge_devices(
    reports: Sequence[RankReport], promise: Promise, limits: Limits, workload: Workload, verdict: Verdict
) -> None:
    """Memory, products and copies of each rank's device."""
    _memory(reports, promise, verdict)
    measured = [report for report in reports if report.problem is None]
    for name in dict.fromkeys(name for report in measured for name in report.tflops):
        rates = {report.rank: report.tflops.get(name, math.nan) for report in measured}
        check, size = (f"{name} product", "TFLOP/s"), workload.sizes.get(name, "")
        promised = promise.peak_tflops if name == SQUARE else None
        usual = compare_ranks(check, rates, limits.compute, reports, verdict, promised=promised, size=size)
        if promised and usual < MET_TFLOPS * promised:
            verdict.say(
                f"{name} product: the median device reaches {amount(usual)} TFLOP/s, {share(usual, promised)} x what "
                f"cluster.device promises ({amount(promised)}); a healthy one reaches {MET_TFLOPS} x or more: is it "
                f"another device, or slowed down by heat or power?",
                serious=usual < FAR_TFLOPS * promised,
            )
    copies = {report.rank: report.memory_gbps for report in measured if report.memory_gbps is not None}
    if copies:
        compare_ranks(("memory copy", "GB/s"), copies, limits.compute, reports, verdict)
    _checksums(reports, verdict)


def judge_storage(reports: Sequence[RankReport], workload: Workload, verdict: Verdict) -> None:
    """The run folder, as every node sees it."""
    for report in reports:
        if report.storage_problem:
            verdict.say(f"run folder, {who([report.rank], reports)}: {report.storage_problem}")
    rates = {report.rank: report.storage_gbps for report in reports if report.storage_gbps is not None}
    if rates:
        compare_ranks(("run folder, written", "GB/s"), rates, STORAGE_SHARE, reports, verdict, serious=False)
    if workload.free_storage_gib < workload.checkpoints_gib:
        verdict.say(
            f"run folder: {amount(workload.free_storage_gib)} GiB are free there, and the run's checkpoints will take "
            f"about {amount(workload.checkpoints_gib)} (12 bytes per parameter; checkpoint.keep of them and the next)",
            serious=False,
        )


def _memory(reports: Sequence[RankReport], promise: Promise, verdict: Verdict) -> None:
    """Totals beside each other and the promise; on a device that a rank has for itself, what is taken already."""
    totals = {r.rank: r.memory_total_gib for r in reports if r.memory_total_gib is not None}
    if not totals:
        return
    check = ("memory, total", "GiB")
    usual = compare_ranks(check, totals, MEMORY_SHARE, reports, verdict, promised=promise.memory_gib)
    if promise.memory_gib is None:
        return
    verdict.measured["memory_gib"] = usual
    if usual < MEMORY_SHARE * promise.memory_gib:
        verdict.say(
            f"memory, total: the median device has {amount(usual)} GiB, and cluster.device promises "
            f"{amount(promise.memory_gib)}"
        )
    free = {report.rank: report.memory_free_gib or 0.0 for report in reports}
    if taken := [rank for rank, total in totals.items() if free[rank] < FREE_SHARE * number(total)]:
        least = min(free[rank] for rank in taken)
        verdict.say(
            f"memory, free: {amount(least)} GiB of {amount(usual)} on {who(taken, reports)}: another process holds the "
            f"rest"
        )


def _checksums(reports: Sequence[RankReport], verdict: Verdict) -> None:
    """Equal factors must give equal products: a device that is only wrong would train on, and nobody would know."""
    measured = [report for report in reports if report.problem is None]
    for name in dict.fromkeys(name for report in measured for name in report.checksums):
        sums = {report.rank: report.checksums.get(name, math.nan) for report in measured}
        usual = typical(sums.values())
        if wrong := [rank for rank, value in sums.items() if not abs(value - usual) <= CHECKSUM_TOLERANCE * usual]:
            verdict.say(
                f"{name} product: another result than the others', from the same numbers, on {who(wrong, reports)} "
                f"({sums[wrong[0]]:.6g} for {usual:.6g}): a broken device or memory"
            )
