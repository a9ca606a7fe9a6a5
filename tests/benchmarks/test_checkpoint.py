"""Checkpoints beside DeepSpeed's own: both are measured, and the page has the last figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import summarise, table, take_turns
from benchmarks.measuring import RESULTS
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.small_runs import this_rank

PAGE = RESULTS.parents[1] / "docs" / "checkpoints.md"


def turns(folder: Path) -> dict[str, Any]:
    return take_turns(this_rank(), rounds=1, shape="tiny", folder=folder)


def test_both_save_and_load_and_are_measured(tmp_path: Path) -> None:
    (measured,) = run_ranks(1, turns, tmp_path)
    row = {"ranks": 1, "storage": "disk", **summarise(measured)}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["save_speed_over_deepspeed"] == row["seconds"]["deepspeed save"] / row["seconds"]["dsmoe save"]
    assert row["stall_over_save"]["first"] == row["seconds"]["stall first"] / row["seconds"]["dsmoe save"]
    assert row["bytes_per_parameter"]["dsmoe"] > 12
    assert row["bytes_per_parameter"]["deepspeed"] > 14, "the whole state as well"
    assert len(table([row]).splitlines()) == 3


def test_the_page_has_the_measured_table() -> None:
    report, page = (
        json.loads((RESULTS / "checkpoint_cpu.json").read_text(encoding="utf-8")),
        PAGE.read_text(encoding="utf-8"),
    )
    assert table(report["rows"]) in page
    assert report["command"] in page
    assert report["hardware"] in page
    for row in report["rows"]:
        assert 12 < row["bytes_per_parameter"]["dsmoe"] < 1.02 * 12
