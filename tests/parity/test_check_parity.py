"""`dsmoe parity`: layouts of one model are the same, another model is told, wrong layouts are one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsmoe.cli import main
from dsmoe.parity.training import TOLERANCES, Training, difference
from tests.helpers.forked import start_on_ranks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")


def test_layouts_of_one_model_are_the_same_and_another_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["tp=2,ep=2,sp=true", "ep=2,train.seed=1"]
    assert main(["parity", TINY, "moe.router.noise=gumbel", "--layouts", *layouts, "--steps", "2"]) == 1
    introduction, changed, _, reference, same, different, *_ = capsys.readouterr().out.splitlines()
    assert introduction == "tiny_cpu, shrunk (--full trains it as it is): 2 steps in fp32 on each layout"
    assert changed == (
        'without what depends on the layout: moe.capacity.factor 1.5 -> 4.0, moe.router.noise "gumbel" -> "none"'
    )
    assert reference.startswith("tp=1,ep=1,dp=1 ")
    assert reference.endswith("reference")
    assert same.startswith(layouts[0])
    assert same.endswith("same")
    assert different.startswith(layouts[1])
    assert "DIFFERENT: loss, gradient norm, held-out loss, weight " in different


def test_under_a_launcher_the_first_layout_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    script = tmp_path / "dsmoe"
    script.write_text("from dsmoe.cli import main\nraise SystemExit(main())\n", encoding="utf-8")
    layouts = ["tp=2,ep=2", "ep=2,zero=0", "ep=1,zero=2"]
    arguments = ["parity", TINY, "--steps=2", "--layouts", *layouts]
    done = start_on_ranks(2, tmp_path, *arguments, script=script, DS_ACCELERATOR="cpu")  # else it warns on stdout
    assert done.code == 0, done.err
    _, _, _, *rows, _, _, last = done.out.splitlines()
    assert last.startswith("nothing was compared with one rank")
    assert [row.split()[0] for row in rows] == layouts
    assert [row.split()[-1] for row in rows] == ["reference", "same", "same"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            "tp=2,ep=3",
            "error: layout 'tp=2,ep=3': parallel.expert (3) must divide moe.num_experts (8)",
        ),
        ("foo=2", "error: layout 'foo=2': there is no key foo; there are tp, "),
        ("tp", "error: layout 'tp': 'tp' is not written key=value, as in tp=2,ep=4,zero=1"),
        ("tp=x", "error: layout 'tp=x': parallel.tensor is a number from 1 on, not x"),
        ("ep=2,dp=two", "error: layout 'ep=2,dp=two': dp is a number from 1 on, not two"),
        ("ep=2,dp=0", "error: layout 'ep=2,dp=0': dp is a number from 1 on, not 0"),
        ("ep=2,nodes=0", "error: layout 'ep=2,nodes=0': cluster.nodes is a number from 1 on, not 0"),
        ("tp=2,tp=4", "error: layout 'tp=2,tp=4' has a key twice"),
        ("ep=64", "error: layout 'ep=64' takes 64 processes, and at most 16 are started on one machine"),
        ("moe.top_k=4", "error: 'moe.top_k=4' is a setting for all layouts rather than a layout: write it before"),
        ("tp=3,nodes=2,dp=1", "error: layout 'tp=3,nodes=2,dp=1': 3 ranks cannot be on 2 nodes alike"),
    ],
)
def test_a_layout_that_cannot_be_is_one_message(layout: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", TINY, "--layouts", "ep=2", layout]) == 2
    out, err = capsys.readouterr()
    assert out == "", "nothing is trained before every layout is known to be right"
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_all_layouts_that_cannot_be_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", TINY, "--layouts", "foo=2", "tp=x", "ep=2"]) == 2
    said = capsys.readouterr().err
    assert ["layout 'foo=2'" in said, "layout 'tp=x'" in said, said.count("\n")] == [True, True, 2]
    assert main(["parity", TINY, "--layouts", "ep=3", "ep=2", "ep=5"]) == 2
    said = capsys.readouterr().err
    assert ["layout 'ep=3': " in said, "layout 'ep=5': " in said, "layout 'ep=2': " in said] == [True, True, False]


def training(weight: float = 1.0, apart: float = 0.0, norm: float = 2.0) -> Training:
    return Training([4.0, 3.0], [2.0, norm], 3.0, {"w": torch.tensor([0.5, weight])}, apart, travelled=0.01)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (training(), []),
        (training(weight=1.0 + 5e-6), []),
        (training(weight=1.0 + 5e-5), ["weight w"]),
        (training(apart=5e-5), ["ranks' copies of a weight"]),
        (training(norm=2.0001), ["gradient norm"]),
        (training(norm=float("nan")), ["gradient norm"]),
        (training(weight=float("nan")), ["weight w"]),
    ],
)
def test_what_is_beyond_rounding(other: Training, wrong: list[str]) -> None:
    assert difference([other], training()).beyond(TOLERANCES["fp32"]) == wrong


def test_every_rank_counts() -> None:
    elsewhere = Training([4.0, 3.0], [2.0, 1.0], 3.0, {}, 0.0, travelled=0.01)
    assert difference([training(), elsewhere], training()).beyond(TOLERANCES["fp32"]) == ["gradient norm"]
