"""The comparison of whole training steps runs, from the same weights and batch, on every contender."""

from __future__ import annotations

import pytest

from benchmarks.train_step import Run, measure, table


def test_contenders_begin_alike_and_are_all_measured() -> None:
    rows = measure(Run(ranks=2, dtype="fp32", shape="tiny", rounds=1, device="cpu"), threads=1)
    assert [row["layout"] for row in rows] == ["expert=1", "expert=2", "expert=2 tensor=2"]
    for row in rows:
        assert {"dsmoe dropless", "deepspeed dropless", "deepspeed capacity 1.25"} <= row["loss"].keys()
        losses = list(row["loss"].values())
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3), "the same model, a few tiny steps later"
        assert all(ratio > 0 for ratio in row["speed_over"].values())
    assert len(table(rows).splitlines()) == 2 + len(rows)
