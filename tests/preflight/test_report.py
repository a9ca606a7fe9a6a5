"""What people read, what programs read, and what goes back into the YAML."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from dsmoe.config import Config
from dsmoe.plan.plan import Plan
from dsmoe.preflight.report import corrected_cluster, text, write_json
from dsmoe.preflight.results import SQUARE, Promise
from tests.helpers.made_up_reports import cluster, verdict_of
from tests.helpers.small_runs import small_config


def plan_with(folder: Path, **keys: Any) -> Plan:
    return Plan.from_config(small_config(folder, cluster={"nodes": 2, "devices_per_node": 2, **keys}))


def test_the_section_loads_again_and_says_what_it_replaces(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, device="h100-sxm", inter_node_gbps=50.0, intra_node_us=9.0)
    measured = {"memory_gib": 79.0, "intra_node_gbps": 312.345, "inter_node_gbps": 41.23456, "intra_node_us": 12.0}
    section = corrected_cluster(plan, measured)
    assert section.splitlines() == [
        "cluster:",
        "  nodes: 2",
        "  devices_per_node: 2",
        "  device: h100-sxm",
        "  collective_timeout_seconds: 60",
        "  inter_node_gbps: 41.2  # measured; was 50",
        "  intra_node_us: 12  # measured; was 9",
        "  intra_node_gbps: 312  # measured",
    ]
    pasted = Config.model_validate({**plan.config.model_dump(), "cluster": yaml.safe_load(section)["cluster"]})
    assert pasted.cluster.inter_node_gbps == 41.2


def test_a_device_with_other_memory_is_described(tmp_path: Path) -> None:
    section = corrected_cluster(plan_with(tmp_path, device="a100-80gb"), {"memory_gib": 39.4})
    assert yaml.safe_load(section)["cluster"]["device"] == {"memory_gib": 39.4, "peak_tflops": 312}


def test_nothing_measured_proposes_nothing(tmp_path: Path) -> None:
    assert corrected_cluster(plan_with(tmp_path), {}) == ""


def test_the_text_has_every_check_and_finding(tmp_path: Path) -> None:
    reports = cluster(2, 2)
    verdict = verdict_of(reports, Promise(inter_node_gbps=50.0))
    lines = text(plan_with(tmp_path), verdict, reports, 41.7).splitlines()
    assert lines[:2] == ["preflight of small: 2 nodes x 2 devices in 42 s", "torch 2.13.0, config sha256 abc"]
    assert "all fine" in lines
    (row,) = (line for line in lines if line.startswith("link between nodes"))
    assert row.split()[3:7] == ["40", "GB/s", "40", "1.00"]
    assert row.split()[7:] == ["host0", "-", "host1,", "devices", "0", "-", "0", "50", "0.80"]
    reports[3].tflops[SQUARE] = 100.0
    reports[1].environment = {}
    written = text(plan_with(tmp_path), verdict_of(reports), reports, 1.0)
    assert "PROBLEM  square product: 100 TFLOP/s on rank 3" in written
    assert "note     NCCL_DEBUG differs" in written
    assert "all fine" not in written


def test_the_json_is_json_even_of_what_is_no_number(tmp_path: Path) -> None:
    reports = cluster(2, 1)
    reports[1].tflops[SQUARE] = math.nan
    write_json(tmp_path / "preflight.json", plan_with(tmp_path), verdict_of(reports), reports, 3.0)
    tree = json.loads((tmp_path / "preflight.json").read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)
    assert tree["exit_code"] == 1
    assert tree["ranks"][1]["tflops"][SQUARE] is None
    assert tree["ranks"][0]["links"] == [{"peer": 1, "gbps": 40.0, "us": 25.0}]
    assert tree["findings"][0]["serious"]
    assert {check["name"] for check in tree["checks"]} >= {"link between nodes", "memory copy", "run folder, written"}
