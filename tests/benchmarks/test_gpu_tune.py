"""Tuning the kernels' block sizes: rehearsed on a CPU, and what may win and be adopted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.tune import CASES, GRID, TINY_SHAPES, Case, adopt, best, main, measure, tune_kernel
from benchmarks.measuring import Deadline, Row, Rows
from benchmarks.peers import Shape
from dsmoe.kernels import blocks
from dsmoe.kernels.blocks import SIZES
from tests.moe import DEVICE

DEFAULT, GOOD, OTHER = ({"block": block, "warps": 1} for block in (128, 64, 32))
BEST = {"kind": "best", "capability": "sm_90", "kernel": "permute", "sizes": GOOD, "speedup": 1.2}
MEASURED = {"device": "NVIDIA H100", "date": "2026-11-27"}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rehearsal_measures_every_point_of_every_kernel(tmp_path: Path) -> None:
    before, default = dict(SIZES), blocks.choose(blocks.read(blocks.TABLE), "default")
    main(["--device", DEVICE, "--tiny", "--rows", str(tmp_path / "rows"), "--seconds", "120"])
    rows = read(tmp_path / "rows")
    tuned = [row for row in rows if row["kind"] == "tune"]
    for kernel, points in GRID.items():
        found = [row for row in tuned if row["kernel"] == kernel]
        cases = {row["case"] for row in found}
        assert len(found) == len(cases) * len(points)
        assert [row["default"] for row in found] == [row["sizes"] == default[kernel] for row in found]
        assert found[0]["default"]
        assert all(row["microseconds"] > 0 and row["gb_per_second"] > 0 for row in found), found
    winners = [row for row in rows if row["kind"] == "best"]
    assert [row["kernel"] for row in winners] == list(GRID)
    for row in winners:
        assert row["capability"] == blocks.capability()
        assert row["speedup"] == 1.0 or row["speedup"] >= 1.03
        assert (row["sizes"] == default[row["kernel"]]) == (row["speedup"] == 1.0)
        assert row["device"]
        assert row["date"]
    assert before == SIZES


def test_a_passed_deadline_measures_nothing(tmp_path: Path) -> None:
    main(["--device", DEVICE, "--tiny", "--rows", str(tmp_path / "rows"), "--seconds", "0"])
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"kind": "checks", "check": f"{kernel}: the whole grid", "passed": None} for kernel in GRID]


def test_a_shape_that_does_not_fit_leaves_the_others_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, whole = TINY_SHAPES[0], CASES["permute"]

    def cases(shape: Shape, device: str) -> list[Case]:
        if shape.name == "large":
            raise torch.OutOfMemoryError("too much")
        return whole(shape, device)

    monkeypatch.setitem(CASES, "permute", cases)
    monkeypatch.setitem(GRID, "permute", [GOOD])
    rows = Rows()
    tune_kernel("permute", [replace(tiny, name="large"), tiny], rows, Deadline(None))
    failed, default, good, winner = rows.rows
    assert (failed["case"], failed["error"]) == ("large", "OutOfMemoryError: too much")
    assert (default["case"], good["case"]) == ("tiny", "tiny")
    assert winner["kind"] == "best"


def outcome(run: Callable[[], torch.Tensor], speed: dict[int, float], deadline: Deadline | None = None) -> list[Row]:
    """The rows of a kernel that returns what `run` does, and takes 60 microseconds divided by the block's speed."""
    cases = [Case(name, (), lambda: (run(),)) for name in ("one", "two")]

    def clock(run: Callable[[], object]) -> float:
        return 60 / speed[SIZES["permute"]["block"]]

    return list(measure("permute", [DEFAULT, GOOD, OTHER], cases, clock, deadline or Deadline(None)))


def block() -> int:
    return SIZES["permute"]["block"]


def test_the_fastest_right_point_wins() -> None:
    rows = outcome(lambda: torch.arange(3), {128: 1.0, 64: 1.5, 32: 1.2})
    assert len(rows) == 6
    assert best(rows, whole=True) == {"sizes": GOOD, "speedup": pytest.approx(1.5)}


def test_less_than_three_percent_are_not_worth_it() -> None:
    rows = outcome(lambda: torch.arange(3), {128: 1.0, 64: 1.02, 32: 0.5})
    assert best(rows, whole=True) == {"sizes": DEFAULT, "speedup": 1.0}
    assert best(rows, whole=False) is None


def test_a_failing_point_does_not_win() -> None:
    def run() -> torch.Tensor:
        if block() == OTHER["block"]:
            raise RuntimeError("out of resource: shared memory")
        return torch.arange(3)

    before = SIZES["permute"]
    rows = outcome(run, {128: 1.0, 64: 1.1, 32: 9.0})
    assert [row.get("error") for row in rows] == [None] * 4 + ["RuntimeError: out of resource: shared memory"] * 2
    assert best(rows, whole=True) == {"sizes": GOOD, "speedup": pytest.approx(1.1)}
    assert SIZES["permute"] is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_wrong_point_does_not_win(dtype: torch.dtype) -> None:
    def run() -> torch.Tensor:
        result = torch.arange(1, 100).to(dtype)
        result[50] += block() == OTHER["block"]
        return result

    rows = outcome(run, {128: 1.0, 64: 1.1, 32: 9.0})
    message = "ArithmeticError: the result differs from that of the default sizes"
    assert [row.get("error") for row in rows] == [None] * 4 + [message] * 2
    assert best(rows, whole=True) == {"sizes": GOOD, "speedup": pytest.approx(1.1)}


def test_another_order_of_summing_is_not_wrong() -> None:
    rows = outcome(lambda: torch.ones(3) * (1 + 1e-6 * (block() == GOOD["block"])), {128: 1.0, 64: 1.1, 32: 1.0})
    assert best(rows, whole=True) == {"sizes": GOOD, "speedup": pytest.approx(1.1)}


def test_wrong_in_one_case_is_out_altogether() -> None:
    rows = outcome(lambda: torch.arange(3), {128: 1.0, 64: 9.0, 32: 1.1})
    rows[3]["error"] = "RuntimeError: only in this case"
    assert best(rows, whole=True) == {"sizes": OTHER, "speedup": pytest.approx(1.1)}


def test_cases_count_alike() -> None:
    """Twice as fast in one and half as fast in the other is no gain."""
    rows = outcome(lambda: torch.arange(3), dict.fromkeys((128, 64, 32), 1.0))
    rows[2]["microseconds"], rows[3]["microseconds"] = 30.0, 120.0
    assert best(rows, whole=True) == {"sizes": DEFAULT, "speedup": 1.0}


def test_nothing_wins_over_a_default_that_failed() -> None:
    def run() -> torch.Tensor:
        if block() == DEFAULT["block"]:
            raise RuntimeError("an illegal memory access was encountered")
        return torch.arange(3)

    rows = outcome(run, {128: 1.0, 64: 2.0, 32: 1.0})
    assert [row["sizes"] for row in rows] == [DEFAULT, DEFAULT]
    assert best(rows, whole=True) is None


def test_what_a_deadline_left_over_may_win_if_all_cases_were_measured() -> None:
    class After(Deadline):
        """So many questions later."""

        def __init__(self, questions: int) -> None:
            self.questions = questions

        def passed(self) -> bool:
            self.questions -= 1
            return self.questions < 0

    speed = {128: 1.0, 64: 1.1, 32: 9.0}
    rows = outcome(lambda: torch.arange(3), speed, After(5))
    assert len(rows) == 5
    assert best(rows, whole=False) == {"sizes": GOOD, "speedup": pytest.approx(1.1)}
    assert best(rows[:3], whole=False) is None
    assert best([], whole=False) is None


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The default sizes alone."""
    path = tmp_path / "blocks.json"
    path.write_text(
        json.dumps({"default": blocks.read(blocks.TABLE)["default"]}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return path


def test_adopted_sizes_stand_in_the_table_and_all_others_stay(table: Path) -> None:
    before = blocks.read(table)
    assert adopt([{"kind": "tune"}, {"other": 1}, {**BEST, **MEASURED}], table) == ["sm_90.permute"]
    assert blocks.read(table) == {**before, "sm_90": {"permute": {"sizes": GOOD, **MEASURED}}}
    router = {**BEST, **MEASURED, "kernel": "topk_router", "sizes": {"tile": 1024, "warps": 4}}
    assert adopt([router, {**BEST, **MEASURED, "sizes": OTHER}], table) == ["sm_90.topk_router", "sm_90.permute"]
    after = blocks.read(table)
    assert blocks.choose(after, "sm_90")["permute"] == OTHER
    assert blocks.choose(after, "sm_90")["topk_router"] == router["sizes"]
    assert blocks.choose(after, "sm_90")["bag_sum"] == before["default"]["bag_sum"]["sizes"]
    adopt([{**BEST, **MEASURED, "capability": "sm_100"}], table)
    assert blocks.read(table) == {**after, "sm_100": {"permute": {"sizes": GOOD, **MEASURED}}}


def test_the_table_in_the_repository_is_as_adopting_writes_it(tmp_path: Path) -> None:
    copied = Path(shutil.copy(blocks.TABLE, tmp_path))
    assert adopt([], copied) == []
    assert copied.read_text(encoding="utf-8") == blocks.TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": "cpu"}, "rehearsal on a CPU"),
        ({"kernel": "permutation"}, r"blocks.json: sm_90.permutation: unknown key"),
        ({"sizes": {"block": 64}}, r"blocks.json: sm_90.permute.sizes.warps: missing"),
    ],
)
def test_rows_that_cannot_be_adopted_change_nothing(change: dict[str, Any], message: str, table: Path) -> None:
    before = table.read_text(encoding="utf-8")
    good = {**BEST, **MEASURED, "kernel": "topk_router", "sizes": {"tile": 1024, "warps": 4}}
    with pytest.raises(ValueError, match=message):
        adopt([good, {**BEST, **MEASURED, **change}], table)
    assert table.read_text(encoding="utf-8") == before


def test_every_kernel_has_a_grid_of_sensible_sizes() -> None:
    assert GRID.keys() == CASES.keys() == blocks.KERNELS.keys()
    table = blocks.read(blocks.TABLE)
    for kernel, points in GRID.items():
        assert 5 <= len(points) <= 16
        assert table["default"][kernel]["sizes"] in points
        for point in points:
            entry: dict[str, Any] = {"sizes": point, **MEASURED}
            blocks.check({**table, "sm_90": {kernel: entry}}, blocks.TABLE)
