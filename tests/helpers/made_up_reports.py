"""Reports of ranks, made up: all alike but for what a test changes."""

from __future__ import annotations

from collections.abc import Callable

from dsmoe.preflight.judge import ON_DEVICES, Verdict, Workload, judge
from dsmoe.preflight.results import SQUARE, Link, Promise, RankReport
from dsmoe.preflight.workload import rounds

GBPS = {True: 300.0, False: 40.0}
"""By whether the devices are of one node."""
US = {True: 12.0, False: 25.0}


def cluster(
    nodes: int, per_node: int, gbps: Callable[[int, int], float] | None = None, us: float | None = None
) -> list[RankReport]:
    """Healthy ranks, each with a link to every other device of its node and to its like in each other node.

    `gbps(a, b)` gives a link's rate where it is not the usual one, and `us` a latency.
    """
    reports = []
    for rank in range(nodes * per_node):
        node, place = divmod(rank, per_node)
        reports.append(
            RankReport(
                rank=rank,
                node=node,
                local_rank=place,
                host=f"host{node}",
                versions={"torch": "2.13.0", "config": "sha256 abc"},
                environment={"NCCL_DEBUG": "WARN"},
                clock=1e9,
                memory_total_gib=79.1,
                memory_free_gib=78.0,
                tflops={SQUARE: 700.0, "experts": 500.0},
                checksums={SQUARE: 72.2, "experts": 36.1},
                memory_gbps=2800.0,
                storage_gbps=2.0 if place == 0 else None,
            )
        )
    inside = [(n * per_node + a, n * per_node + b) for n in range(nodes) for t in rounds(per_node) for a, b in t]
    across = [(a * per_node + p, b * per_node + p) for t in rounds(nodes) for a, b in t for p in range(per_node)]
    for near, ends in ((True, inside), (False, across)):
        for a, b in ends:
            rate = gbps(a, b) if gbps else GBPS[near]
            reports[a].links.append(Link(b, rate, us or US[near]))
            reports[b].links.append(Link(a, rate, us or US[near]))
    return reports


def verdict_of(
    reports: list[RankReport], promise: Promise | None = None, groups: dict[str, list[list[int]]] | None = None
) -> Verdict:
    return judge(reports, promise or Promise(), ON_DEVICES, Workload(sizes={}, groups=groups or {}))


def texts(verdict: Verdict) -> list[str]:
    return [finding.text for finding in verdict.findings]
