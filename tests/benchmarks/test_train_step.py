"""Whole training steps compared: contenders train one and the same model, and the page has the last figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import train_step
from benchmarks.measuring import RESULTS, Rows
from benchmarks.train_step import OPPONENTS, Entrants, measure, table
from benchmarks.workload import SHAPES, Run, make_config, sequences_that_fit
from dsmoe.plan import count_parameters
from dsmoe.plan.flops import flops_per_token
from dsmoe.runtime.processes import Rank

PAGE = RESULTS.parents[1] / "docs" / "training_step.md"


def test_contenders_train_the_same_model_and_are_all_measured() -> None:
    kept = Rows()
    measure(Run(ranks=2, dtype="fp32", shape="tiny", rounds=1, device="cpu"), threads=1, rows=kept)
    rows = [row for row in kept.rows if row.get("contender") != "transformers"]  # an optional package
    assert [row["layout"] for row in rows] == ["expert=1", "expert=2", "expert=2 tensor=2"]
    for row in rows:
        assert row["kind"] == "step"
        assert {"dsmoe dropless", "deepspeed dropless"} <= row["loss"].keys()
        whole = {name: loss for name, loss in row["loss"].items() if "capacity" not in name}
        assert list(whole.values()) == pytest.approx([row["loss"]["dsmoe dropless"]] * len(whole), rel=1e-5)
        assert row["speed_over"].keys() == (row["tokens_per_second"].keys() & OPPONENTS.keys()) - (
            {"deepspeed capacity 1.25"} if "tensor" in row["layout"] else set()
        )
        assert all(ratio > 0 for ratio in row["speed_over"].values())
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_a_run_whose_time_is_over_has_one_round_of_the_first_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "GRACE_SECONDS", 200.0)  # its time is over before torch is imported
    run = Run(ranks=1, dtype="bf16", shape="tiny", rounds=10**9, device="cpu", until=0.0)
    measure(run, threads=1, rows=Rows(tmp_path / "rows.jsonl"))
    *left_out, row, check = [
        json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {each["contender"] for each in left_out} == {
        "dsmoe expert=1 capacity 1.25",
        "deepspeed expert=1 dropless",
        "deepspeed expert=1 capacity 1.25",
        "transformers",
    }
    assert {(each["kind"], each["error"]) for each in left_out} == {("step", "no time left")}
    assert row["tokens_per_second"].keys() == {"dsmoe dropless"}
    assert row["speed_over"] == {}
    assert check == {"kind": "checks", "check": "dsmoe in bf16, 1 rank", "passed": None}, (
        "no time for the other capacity"
    )
    assert table([*left_out, row, check]).endswith(
        f"| bf16 |  |  |  | {row['tokens_per_second']['dsmoe dropless']:.0f} |"
    )
    assert len(table([*left_out, {**row, "tokens_per_second": {}}]).splitlines()) == 3


def entrants(ranks: int) -> Entrants:
    run = Run(ranks=ranks, dtype="fp32", shape="tiny", rounds=1, device="cpu")
    return Entrants(run, Rank(0, 0, ranks, torch.device("cpu")))


def test_a_contender_that_fails_is_left_out_with_one_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.\nSee the manual.")

    def missing(*_: object) -> None:
        raise ImportError("no transformers")

    freed: list[bool] = []
    monkeypatch.setattr(train_step, "free_memory", lambda: freed.append(True))
    alone, two = entrants(1), entrants(2)
    config = make_config(alone.run, {}, None, Path())
    alone.add("large", too_large, config)
    alone.add("missing", missing, config)
    two.add("missing", missing, config)
    with pytest.raises(torch.OutOfMemoryError):  # the others would wait for it
        two.add("large", too_large, config)
    assert alone.contenders == two.contenders == {}
    assert alone.left_out == {
        "large": "CUDA out of memory. Tried to allocate 40.00 GiB.",
        "missing": "no transformers",
    }
    assert two.left_out == {"missing": "no transformers"}
    assert len(freed) == 3


def test_a_contender_whose_step_fails_is_forgotten() -> None:
    alone = entrants(1)
    alone.contenders["tired"] = object()  # type: ignore[assignment]
    assert alone.attempt("tired", lambda: 1 // 0) is None
    assert (alone.contenders, alone.left_out) == ({}, {"tired": "integer division or modulo by zero"})
    assert alone.attempt("well", lambda: 7) == 7


def test_five_contenders_of_the_large_shape_fit_an_80_gb_card() -> None:
    """The arithmetic of the comment at `SHAPES`; activations measured on a CPU, at the same widths."""
    run = Run(ranks=1, dtype="bf16", shape="gpu", rounds=1, device="h100-sxm")
    shape = SHAPES["gpu"]
    parameters = count_parameters(make_config(run, {}, None, Path())).total
    logits = run.tokens * shape["vocab"] * 4
    layers = 1024 * shape["layers"] * run.tokens
    activations = max(118 * layers, 90 * layers + 3 * logits)
    needed = 5 * 14 * parameters + 2 * 5e8 * 2 + 4 * parameters + activations
    assert parameters == pytest.approx(487e6, rel=0.01)
    assert needed == pytest.approx(63e9, rel=0.02)
    assert needed < 0.8 * 79.1 * 2**30


@pytest.mark.parametrize(("card", "sequences"), [(79.1, 16), (139.8, 47), (39.4, 1)])
def test_a_step_fills_the_card_that_there_is(card: float, sequences: int) -> None:
    assert sequences_that_fit(int(card * 2**30)) == sequences


def test_figures_follow_from_seconds_bytes_and_flops() -> None:
    run = Run(ranks=2, dtype="bf16", shape="tiny", rounds=3, device="h100-sxm")
    one = {"seconds": [0.5, 0.25, 1.0], "peak_bytes": 3 * 2**30, "loss": 4.0}
    other = {"seconds": [1.0, 0.75, 1.5], "peak_bytes": 6 * 2**30, "loss": 4.0}
    measured = {"dsmoe expert=1 dropless": one, "deepspeed expert=1 dropless": other}
    row = train_step.summarise(run, "expert=1", measured)
    tokens = 2 * 2 * 32
    assert row["tokens_per_second"] == {"dsmoe dropless": tokens / 0.5, "deepspeed dropless": tokens / 1.0}
    assert row["speed_over"] == {"deepspeed dropless": 2.0}
    assert row["peak_gib"] == {"dsmoe dropless": 3.0, "deepspeed dropless": 6.0}
    config = make_config(run, {}, None, Path())
    flops = flops_per_token(config, count_parameters(config), 32)
    peak = 2 * 989.5e12
    full, causal = 100 * tokens / 0.5 * flops.training / peak, 100 * tokens / 0.5 * flops.causal_training / peak
    assert row["mfu_percent"]["dsmoe dropless"] == pytest.approx(full)
    assert row["mfu_causal_percent"]["dsmoe dropless"] == pytest.approx(causal)
    assert causal < full
    shown = {**row, "ranks": 2, "layout": "expert=1", "dtype": "bf16", "mfu_percent": {"dsmoe dropless": 41.26}}
    heading, _, line = table([{**shown, "mfu_causal_percent": {"dsmoe dropless": 38.0}}]).splitlines()
    assert heading.endswith(
        "| MFU, attention counted in full (PaLM) | MFU, causal attention counted half (Megatron-LM) |"
    )
    assert line.endswith("| 41.3 % | 38.0 % |")
    cpu = {key: value for key, value in shown.items() if "mfu" not in key}
    assert "MFU" not in table([cpu])


@pytest.mark.parametrize(
    ("left_out", "verdict"),
    [
        ({}, {"passed": True}),
        ({"transformers": "not installed", "deepspeed dropless": "out of memory"}, {"passed": True}),
        ({"dsmoe dropless": "no time left"}, {"passed": None}),
        (
            {"dsmoe dropless": "no time left", "dsmoe capacity 1.25": "illegal access"},
            {"passed": False, "detail": "dsmoe capacity 1.25: illegal access"},
        ),
    ],
)
def test_a_step_owes_what_is_ours(left_out: dict[str, str], verdict: dict[str, object]) -> None:
    assert train_step._verdict(left_out) == verdict


def test_ranks_that_fail_end_the_program_with_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda _: 7))
    with pytest.raises(SystemExit) as end:
        measure(Run(ranks=2, dtype="fp32", shape="tiny", rounds=1, device="cpu"), 1, Rows())
    assert end.value.code == 7


def test_ranks_that_hang_are_ended_and_what_they_had_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(ranks=1, dtype="fp32", shape="tiny", rounds=9, device="cpu", until=0.0)
    known = {"dsmoe expert=1 dropless": {"seconds": [0.5], "peak_bytes": 0, "loss": None}}
    text = json.dumps({"contenders": known, "left_out": {}})
    write = f"Path(os.environ['RESULTS'], 'measured.json').write_text({text!r})"
    hang = f"import os, time; from pathlib import Path; {write}; time.sleep(600)"
    real = train_step.subprocess.Popen
    monkeypatch.setattr(train_step.subprocess, "Popen", lambda _, env: real([sys.executable, "-c", hang], env=env))
    monkeypatch.setattr(train_step, "GRACE_SECONDS", 3.0)
    rows = Rows(tmp_path / "rows")
    with pytest.raises(SystemExit):
        measure(run, 1, rows)
    assert [row["kind"] for row in rows.rows] == ["step", "checks"]
    assert rows.rows[0]["tokens_per_second"] == {"dsmoe dropless": run.tokens / 0.5}
    assert "still running 3 s after their time" in capfd.readouterr().err


def test_the_page_has_the_measured_table() -> None:
    report, page = (
        json.loads((RESULTS / "train_step_cpu.json").read_text(encoding="utf-8")),
        PAGE.read_text(encoding="utf-8"),
    )
    assert table(report["rows"]) in page
    assert report["command"] in page
    assert report["hardware"] in page
