"""Who is named, for what, and who is not; on made-up numbers."""

from __future__ import annotations

import math
import random

import pytest

from dsmoe.preflight.judge import ON_DEVICES, Workload, judge
from dsmoe.preflight.judge.compare import typical
from dsmoe.preflight.results import SQUARE, Promise, RankReport
from tests.helpers.made_up_reports import GBPS, cluster, texts, verdict_of

H100 = Promise(memory_gib=79.1, peak_tflops=989.5, intra_node_gbps=400.0, inter_node_gbps=50.0)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (3, 1), (5, 2), (40, 8)])
def test_nothing_is_said_of_a_healthy_cluster(nodes: int, per_node: int) -> None:
    verdict = verdict_of(cluster(nodes, per_node), H100)
    assert not verdict.findings
    assert verdict.exit_code == 0
    measured = {"memory_gib": 79.1}
    if per_node > 1:
        measured |= {"intra_node_gbps": 300.0, "intra_node_us": 12.0}
    if nodes > 1:
        measured |= {"inter_node_gbps": 40.0, "inter_node_us": 25.0}
    assert verdict.measured == measured


def test_noise_within_the_limits_is_nobodys_fault() -> None:
    generator = random.Random(0)
    reports = cluster(6, 4, lambda a, b: GBPS[a // 4 == b // 4] * generator.uniform(0.7, 1.0))
    for report in reports:
        report.tflops = {name: rate * generator.uniform(0.92, 1.0) for name, rate in report.tflops.items()}
    assert not verdict_of(reports, H100).findings


def test_a_slow_rank_is_named_with_host_device_and_factor() -> None:
    reports = cluster(2, 4)
    reports[6].tflops["experts"] = 310.0
    verdict = verdict_of(reports)
    assert texts(verdict) == ["experts product: 310 TFLOP/s on rank 6 (host1, device 2), 0.62 x the median 500"]
    assert verdict.exit_code == 1
    (check,) = (check for check in verdict.checks if check.name == "experts product")
    assert (check.median, check.worst, check.where) == (500.0, 310.0, "rank 6 (host1, device 2)")


def test_of_two_ranks_the_slower_one_is_named() -> None:
    for slow in (0, 1):
        reports = cluster(1, 2)
        reports[slow].tflops[SQUARE] = 350.0
        assert texts(verdict_of(reports)) == [
            f"square product: 350 TFLOP/s on rank {slow} (host0, device {slow}), 0.50 x the median 700"
        ]


def test_a_node_all_of_whose_ranks_are_slow_is_named_as_one() -> None:
    reports = cluster(3, 4)
    for report in reports[4:8]:
        report.memory_gbps = 1400.0
    assert texts(verdict_of(reports)) == [
        "memory copy: 1,400 GB/s on host1 (all of its 4 ranks), 0.50 x the median 2,800"
    ]


def test_many_slow_ranks_are_counted_rather_than_listed() -> None:
    reports = cluster(32, 2)
    for node in range(10):
        reports[2 * node].tflops[SQUARE] = 70.0
    (text,) = texts(verdict_of(reports))
    assert "rank 6 (host3, device 0) and 6 more, 0.10 x" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_no_number_is_a_finding_and_moves_no_median(value: float) -> None:
    reports = cluster(1, 4)
    reports[3].tflops[SQUARE] = value
    verdict = verdict_of(reports)
    assert [text.split(":")[0] for text in texts(verdict)] == ["square product"]
    assert "no number from rank 3 (host0, device 3)" in texts(verdict)[0]
    assert verdict.exit_code == 1
    assert next(check.median for check in verdict.checks if check.name == "square product") == 700.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 73.0])
def test_a_device_that_computes_something_else_is_named(value: float) -> None:
    reports = cluster(2, 2)
    reports[1].checksums[SQUARE] = value
    verdict = verdict_of(reports)
    (text,) = texts(verdict)
    assert "another result than the others', from the same numbers, on rank 1 (host0, device 1)" in text
    assert verdict.exit_code == 1


def test_one_rank_alone_is_only_held_against_the_promise() -> None:
    reports = cluster(1, 1)
    assert verdict_of(reports, H100).exit_code == 0
    reports[0].tflops[SQUARE] = 450.0
    verdict = verdict_of(reports, H100)
    assert verdict.exit_code == 0
    assert "0.45 x what cluster.device promises (990)" in texts(verdict)[0]
    reports[0].tflops[SQUARE] = 200.0
    assert verdict_of(reports, H100).exit_code == 1


def test_memory_is_held_against_the_promise_and_what_is_free() -> None:
    reports = cluster(1, 4)
    assert verdict_of(reports, Promise(memory_gib=139.8)).exit_code == 1
    reports[2].memory_free_gib = 40.0
    assert texts(verdict_of(reports, H100)) == [
        "memory, free: 40 GiB of 79.1 on rank 2 (host0, device 2): another process holds the rest"
    ]
    assert not verdict_of(reports).findings  # a host's memory is shared by what runs there
    reports[2].memory_total_gib, reports[2].memory_free_gib = 39.4, 39.0
    assert texts(verdict_of(reports, H100)) == [
        "memory, total: 39.4 GiB on rank 2 (host0, device 2), 0.50 x the median 79.1"
    ]


def test_a_slow_node_is_named_and_its_partners_are_not() -> None:
    verdict = verdict_of(cluster(4, 1, lambda a, b: 4.0 if 2 in (a, b) else 40.0))
    assert texts(verdict) == ["link between nodes: 4 GB/s at best on host2 (rank 2), 0.10 x the median 40"]
    assert verdict.exit_code == 1


@pytest.mark.parametrize("nodes", [3, 4, 7, 30])
def test_a_slow_node_of_several_devices(nodes: int) -> None:
    verdict = verdict_of(cluster(nodes, 4, lambda a, b: 5.0 if 2 in (a // 4, b // 4) and a // 4 != b // 4 else 300.0))
    assert texts(verdict) == [
        "link between nodes: 5 GB/s at best on host2 (all of its 4 ranks), 0.017 x the median 300"
    ]


def test_a_slow_adapter_is_one_device() -> None:
    verdict = verdict_of(cluster(4, 4, lambda a, b: 5.0 if 9 in (a, b) and a // 4 != b // 4 else 100.0))
    assert texts(verdict) == ["link between nodes: 5 GB/s at best on rank 9 (host2, device 1), 0.05 x the median 100"]


def test_a_slow_cable_is_named_by_its_two_ends() -> None:
    verdict = verdict_of(cluster(5, 1, lambda a, b: 4.0 if (a, b) == (1, 3) else 40.0))
    assert texts(verdict) == ["link between nodes: 4 GB/s on host1 - host3, 0.10 x the median 40"]
    verdict = verdict_of(cluster(3, 2, lambda a, b: 4.0 if (a, b) == (1, 5) else 40.0))
    assert texts(verdict) == ["link between nodes: 4 GB/s on host0 - host2, devices 1 - 1, 0.10 x the median 40"]


def test_of_two_nodes_nobody_can_say_which_it_is() -> None:
    verdict = verdict_of(cluster(2, 4, lambda a, b: 4.0 if (a, b) == (1, 5) else 300.0))
    assert texts(verdict) == ["link between nodes: 4 GB/s on host0 - host1, devices 1 - 1, 0.013 x the median 300"]


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_link_without_a_number_is_named(value: float) -> None:
    verdict = verdict_of(cluster(4, 1, lambda a, b: value if (a, b) == (0, 1) else 40.0))
    assert texts(verdict) == ["link between nodes: no number on host0 - host1"]
    verdict = verdict_of(cluster(2, 1, lambda a, b: value), H100)
    assert texts(verdict)[0] == "link between nodes: no number on host0 - host1"
    assert "inter_node_gbps" not in verdict.measured


def test_devices_of_a_node_may_have_links_of_several_kinds() -> None:
    def by_switch(a: int, b: int) -> float:
        return 40.0 if a // 4 != b // 4 or a % 4 // 2 != b % 4 // 2 else 300.0

    assert not verdict_of(cluster(3, 4, by_switch)).findings
    verdict = verdict_of(cluster(3, 4, lambda a, b: 4.0 if (a, b) == (4, 6) else by_switch(a, b)))
    assert texts(verdict) == ["link inside a node: 4 GB/s on host1, devices 0 - 2, 0.10 x the median 40"]


def test_links_far_from_the_promise_are_serious_and_near_it_a_note() -> None:
    for rate, serious in ((40.0, None), (34.0, False), (26.0, False), (24.0, True)):
        verdict = verdict_of(cluster(3, 1, lambda a, b, rate=rate: rate), H100)  # type: ignore[misc]
        assert [finding.serious for finding in verdict.findings] == ([] if serious is None else [serious])
        assert verdict.exit_code == int(serious or False)
    (text,) = texts(verdict_of(cluster(2, 1, lambda a, b: 1.2), H100))
    assert text == (
        "link between nodes: 1.2 GB/s on host0 - host1, 0.024 x what cluster.inter_node_gbps promises (50); 0.7 x or "
        "more would do"
    )


def test_latency_is_a_note() -> None:
    promise = Promise(inter_node_us=5.0)
    verdict = verdict_of(cluster(3, 1), promise)
    assert texts(verdict) == ["latency between nodes: 25 us, 5.00 x what cluster.inter_node_us promises (5)"]
    assert verdict.exit_code == 0
    reports = cluster(4, 1)
    link = reports[3].links[0]
    reports[3].links[0] = type(link)(link.peer, link.gbps, 900.0)
    (text,) = texts(verdict_of(reports))
    assert text.startswith("latency between nodes: 900 us on host")
    assert text.endswith("36.00 x the median 25")


def with_messages(reports: list[RankReport], slow: set[int]) -> list[RankReport]:
    for report in reports:
        report.collective_gbps = {"dispatch": 10.0 if report.rank in slow else 100.0}
    return reports


def test_a_slow_group_is_named_only_where_no_link_explains_it() -> None:
    groups = {"dispatch": [[0, 1], [2, 3], [4, 5]]}
    reports = with_messages(cluster(3, 2), {2, 3})
    assert texts(verdict_of(reports, groups=groups)) == [
        "dispatch: 10 GB/s in the group of host1 (all of its 2 ranks), 0.10 x the median group's 100, though none of "
        "its links is slow"
    ]
    reports = with_messages(cluster(3, 2, lambda a, b: 4.0 if (a, b) == (2, 3) else 40.0), {2, 3})
    assert texts(verdict_of(reports, groups=groups)) == [
        "link inside a node: 4 GB/s on host1, devices 0 - 1, 0.10 x the median 40"
    ]


def test_versions_that_differ_are_told_the_fewest_first() -> None:
    reports = cluster(4, 2)
    for rank in (2, 3):
        reports[rank].versions["torch"] = "2.9.0"
    verdict = verdict_of(reports)
    (text,) = texts(verdict)
    assert text.startswith("torch differs: 2.9.0 on host1 (all of its 2 ranks); 2.13.0 on host0 (all of its 2 ranks), ")
    assert verdict.exit_code == 1


def test_steering_variables_and_clocks_that_differ_are_notes() -> None:
    reports = cluster(3, 1)
    reports[1].environment = {}
    reports[2].clock += 7.5
    verdict = verdict_of(reports)
    assert texts(verdict) == [
        "NCCL_DEBUG differs: not set on host1 (rank 1); WARN on host0 (rank 0) and host2 (rank 2)",
        "clock: host2 is +7.5 s off the median",
    ]
    assert verdict.exit_code == 0


def test_ranks_that_are_not_where_the_topology_thinks_are_told() -> None:
    reports = cluster(2, 2)
    reports[1].host, reports[2].host = "host1", "host0"  # dealt out in turn instead of host by host
    verdict = verdict_of(reports)
    assert "ranks: those of node 0 are on host0, host1" in texts(verdict)[0]
    assert verdict.exit_code == 1
    reports = cluster(2, 1)
    reports[1].host = "host0"
    assert texts(verdict_of(reports)) == ["ranks: nodes 0 and 1 are both on host0"]


def test_a_rank_with_a_problem_is_told_once() -> None:
    reports = cluster(1, 4)
    reports[0].problem, reports[0].tflops, reports[0].checksums = "AcceleratorError: uncorrectable ECC error", {}, {}
    reports[0].memory_gbps = None
    verdict = verdict_of(reports)
    assert texts(verdict) == ["rank 0 (host0, device 0): AcceleratorError: uncorrectable ECC error"]
    assert verdict.exit_code == 1
    assert len(verdict.checks) > 3


def test_storage_that_is_not_shared_is_serious_and_slow_or_full_is_not() -> None:
    reports = cluster(3, 2)
    reports[2].storage_problem = "cannot write in /runs: Read-only file system; see runs_dir"
    verdict = verdict_of(reports)
    assert texts(verdict)[0].startswith("run folder, rank 2 (host1, device 0): cannot write in /runs")
    assert verdict.exit_code == 1
    reports = cluster(3, 2)
    reports[4].storage_gbps = 0.1
    workload = Workload({}, {}, checkpoints_gib=500.0, free_storage_gib=20.0)
    verdict = judge(reports, Promise(), ON_DEVICES, workload)
    assert [finding.serious for finding in verdict.findings] == [False, False]
    assert "0.1 GB/s on rank 4 (host2, device 0)" in texts(verdict)[0]
    assert "20 GiB are free there, and the run's checkpoints will take about 500" in texts(verdict)[1]


def test_serious_findings_come_first() -> None:
    reports = cluster(3, 1)
    reports[1].clock += 9
    reports[2].tflops[SQUARE] = 1.0
    assert [finding.serious for finding in verdict_of(reports).findings] == [True, False]


def test_reports_travel_as_json() -> None:
    (report,) = cluster(1, 1)
    report.tflops[SQUARE] = math.pi
    assert RankReport.from_json(report.json()) == report
    pair = cluster(1, 2)[0]
    assert RankReport.from_json(pair.json()) == pair


def test_the_typical_one_is_the_upper_median() -> None:
    assert typical([1.0, 2.0]) == 2.0
    assert typical([1.0, 2.0, 9.0]) == 2.0
    assert typical([math.nan, 3.0, math.inf, 0.0]) == 3.0
    assert typical([]) == 0.0
