"""Whole training steps compared: contenders train one and the same model, and the page has the last figures."""

from __future__ import annotations

import json

import pytest

from benchmarks.measuring import RESULTS
from benchmarks.train_step import OPPONENTS, Run, measure, table

PAGE = RESULTS.parents[1] / "docs" / "training_step.md"


def test_contenders_train_the_same_model_and_are_all_measured() -> None:
    rows = measure(Run(ranks=2, dtype="fp32", shape="tiny", rounds=1, device="cpu"), threads=1)
    assert [row["layout"] for row in rows] == ["expert=1", "expert=2", "expert=2 tensor=2"]
    for row in rows:
        assert {"dsmoe dropless", "deepspeed dropless"} <= row["loss"].keys()
        whole = {name: loss for name, loss in row["loss"].items() if "capacity" not in name}
        assert list(whole.values()) == pytest.approx([row["loss"]["dsmoe dropless"]] * len(whole), rel=1e-5)
        assert row["speed_over"].keys() == (row["tokens_per_second"].keys() & OPPONENTS.keys()) - (
            {"deepspeed capacity 1.25"} if "tensor" in row["layout"] else set()
        )
        assert all(ratio > 0 for ratio in row["speed_over"].values())
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_the_page_has_the_measured_table() -> None:
    report, page = json.loads((RESULTS / "train_step_cpu.json").read_text()), PAGE.read_text()
    assert table(report["rows"]) in page
    assert report["command"] in page
    assert report["hardware"] in page
