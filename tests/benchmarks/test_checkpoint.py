"""Checkpoints beside DeepSpeed's own: both are measured, and the page has the last figures."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.checkpoint import measure, table
from benchmarks.moe_layer import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "checkpoints.md"


def test_both_save_and_load_and_are_measured(tmp_path: Path) -> None:
    row = measure(ranks=1, storage="disk", shape="tiny", rounds=1, parent=tmp_path)
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["save_speed_over_deepspeed"] == row["seconds"]["deepspeed save"] / row["seconds"]["dsmoe save"]
    assert row["stall_over_save"]["first"] == row["seconds"]["stall first"] / row["seconds"]["dsmoe save"]
    assert row["bytes_per_parameter"]["dsmoe"] > 12
    assert len(table([row]).splitlines()) == 3


def test_the_page_has_the_measured_table() -> None:
    report, page = json.loads((RESULTS / "checkpoint_cpu.json").read_text()), PAGE.read_text()
    assert table(report["rows"]) in page
    assert report["command"] in page
    assert report["hardware"] in page
    for row in report["rows"]:
        assert 12 < row["bytes_per_parameter"]["dsmoe"] < 1.02 * 12
