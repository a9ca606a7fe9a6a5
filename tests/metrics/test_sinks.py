"""Metrics that are written can be read back, and a resumed run leaves no doubles."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe.metrics.sinks import JsonLines, TensorBoard


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestJsonLines:
    def test_one_object_per_step_with_its_time(self, tmp_path: Path) -> None:
        sink = JsonLines(tmp_path / "metrics.jsonl", resume_step=0)
        before = time.time()
        sink.write(10, {"train/loss": 2.5, "optim/lr": 1e-3})
        sink.write(20, {"train/loss": 2.25})
        first, second = lines_of(tmp_path / "metrics.jsonl")  # readable before it is closed
        sink.close()
        assert (first["step"], first["train/loss"], first["optim/lr"]) == (10, 2.5, 1e-3)
        assert (second["step"], second["train/loss"]) == (20, 2.25)
        assert before - 0.001 <= first["time"] <= second["time"] <= time.time() + 0.001

    def test_resuming_drops_later_lines_and_one_that_was_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        sink = JsonLines(path, resume_step=0)
        for step in (10, 20, 30):
            sink.write(step, {"train/loss": step / 10})
        sink.close()
        whole = path.read_text(encoding="utf-8")
        path.write_text(whole + '{"step": 4', encoding="utf-8")
        resumed = JsonLines(path, resume_step=20)
        resumed.write(30, {"train/loss": -1.0})
        resumed.close()
        assert [(line["step"], line["train/loss"]) for line in lines_of(path)] == [(10, 1.0), (20, 2.0), (30, -1.0)]
        assert path.read_text(encoding="utf-8").startswith(whole[: whole.index('{"step": 30')]), (
            "kept lines are not rewritten"
        )
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("broken", ['{"step": 2', '{"step": "two"}', '{"loss": 1.0}', "[1, 2]", "3", ""])
    def test_lines_that_are_no_metrics_are_dropped(self, broken: str, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + broken + "\n", encoding="utf-8")
        JsonLines(path, resume_step=5).close()
        assert path.read_text(encoding="utf-8") == '{"step": 1}\n'

    def test_starting_anew_empties_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n', encoding="utf-8")
        JsonLines(path, resume_step=0).close()
        assert path.read_text(encoding="utf-8") == ""


class TestTensorBoard:
    def read(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_scalars_are_read_back_under_their_names(self, tmp_path: Path) -> None:
        sink = TensorBoard(tmp_path, resume_step=0)
        sink.write(10, {"train/loss": 2.5, "moe/layer_003/load_cv": 0.5})
        sink.write(20, {"train/loss": 2.25})
        sink.close()
        assert self.read(tmp_path) == {"train/loss": [(10, 2.5), (20, 2.25)], "moe/layer_003/load_cv": [(10, 0.5)]}

    def test_resuming_hides_later_steps_of_the_run_before(self, tmp_path: Path) -> None:
        sink = TensorBoard(tmp_path, resume_step=0)
        for step in (10, 20, 30):
            sink.write(step, {"train/loss": float(step)})
        sink.close()
        time.sleep(1.1)  # event files are named, and read, by the second
        resumed = TensorBoard(tmp_path, resume_step=20)
        resumed.write(30, {"train/loss": -1.0})
        resumed.close()
        assert self.read(tmp_path) == {"train/loss": [(10, 10.0), (20, 20.0), (30, -1.0)]}
