"""Checkpoints and run folders of before the code was rebuilt: a run goes on from them with the same numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dsmoe.cli import main as command
from dsmoe.config import load_config
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.checkpoint_runs import folder_of, go_on, tensors_of
from tests.helpers.stored_files import DATA, FINISHED, RUNS, copy_for, figures, inside, said_of_run, start

LAST = 5
"""Step at which the runs end."""
CHECKPOINT = "checkpoints/step_00000003"
FP32, BF16, OTHER_LAYOUT = 1e-6, 1e-2, 1e-5
"""Relative differences that rounding explains on another processor, and on another layout in fp32. On the processor
that wrote the files, and the same layout, there are none."""
ONE_RANK = ("cluster.devices_per_node=1", "parallel.expert=1")


def check_went_on(run: str, work: Path, out: str, tolerance: float, *unlike: str) -> None:
    """Check that a run has gone on from its stored checkpoint to its end, and what its later steps came to.

    Args:
        run: which.
        work: where it is.
        out: what the start has printed.
        tolerance: relative, of all numbers.
        unlike: metrics that are not compared.
    """
    assert f"continuing from runs/{run}/{CHECKPOINT}" in out
    for trouble in ("passed over", "cannot be used"):
        assert trouble not in out
    before, now = figures(DATA / "run_folders" / run), figures(work / "runs" / run)
    assert sorted(now) == sorted(before) == list(range(LAST + 1))
    for step in range(4):
        assert now[step] == before[step], "what the run had written"
    for step in range(4, LAST + 1):
        expected = {name: value for name, value in before[step].items() if name not in unlike}
        assert {name: now[step][name] for name in expected} == pytest.approx(expected, rel=tolerance), step


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_on_its_layout_with_the_numbers_of_one_that_was_not_interrupted(run: str, tmp_path: Path) -> None:
    copy_for(tmp_path, run)
    out = start(tmp_path, RUNS[run], f"yaml/{run}.yaml").out
    assert "changed since" not in out, "the run folder's config.yaml says what the user's file does"
    if run == "residual":  # where rounding sends a few tokens to another expert, another number is dropped
        check_went_on(run, tmp_path, out, BF16, "moe/dropped_percent")
    else:
        check_went_on(run, tmp_path, out, FP32)


@pytest.mark.parametrize("run", ["sigmoid", "dense"])
def test_a_run_of_two_ranks_goes_on_on_one_from_the_config_in_its_folder(run: str, tmp_path: Path) -> None:
    """And from text that has moved: the folder says what it was."""
    copy_for(tmp_path, run)
    (tmp_path / "yaml" / "corpus.txt").rename(tmp_path / "moved.txt")
    out = start(tmp_path, 1, f"runs/{run}/config.yaml", *ONE_RANK, "data.sources.0.path=moved.txt").out
    check_went_on(run, tmp_path, out, OTHER_LAYOUT)


def load_and_save(run: str, work: Path) -> Path:
    """The checkpoint that a run on these ranks writes of what it has loaded."""
    os.chdir(work)
    config = load_config(f"yaml/{run}.yaml")
    go_on(config, Path("runs", run, CHECKPOINT), 0)
    return work / folder_of(config) / Path(CHECKPOINT).name


@pytest.mark.parametrize("run", RUNS)
def test_weights_optimizer_and_what_layers_carry_are_loaded_bit_by_bit(run: str, tmp_path: Path) -> None:
    [again, *_] = run_ranks(RUNS[run], load_and_save, run, copy_for(tmp_path, run))
    before, now = tensors_of(DATA / "run_folders" / run / CHECKPOINT), tensors_of(again)
    assert before.keys() == now.keys()
    for key, tensor in before.items():
        assert torch.equal(now[key], tensor), key


@pytest.mark.parametrize("run", [*RUNS, FINISHED])
def test_a_checkpoint_is_whole_and_of_the_run_in_the_users_file(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_for(tmp_path, run)
    with inside(tmp_path):
        assert command(["checkpoint", "verify", f"runs/{run}"]) == 0
        assert "is whole" in capsys.readouterr().out
        assert command(["checkpoint", "show", f"runs/{run}", "--against", f"yaml/{run}.yaml"]) == 0
    assert f"the same config as yaml/{run}.yaml" in capsys.readouterr().out


def test_a_finished_run_says_its_result_again_and_takes_no_step(tmp_path: Path) -> None:
    copy_for(tmp_path, FINISHED)
    out = start(tmp_path, 1, f"yaml/{FINISHED}.yaml").out
    assert said_of_run(out) == (DATA / "said_when_finished.txt").read_text(encoding="utf-8")
    assert figures(tmp_path / "runs" / FINISHED) == figures(DATA / "run_folders" / FINISHED)


def test_a_run_folder_refuses_another_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_for(tmp_path, "dense")
    with inside(tmp_path):
        check = ["config", "check", "yaml/dense.yaml"]
        assert command(check) == 0
        assert command([*check, "optimizer.weight_decay=0.3"]) == 2
    assert "optimizer.weight_decay is 0.2 there and 0.3 here" in capsys.readouterr().err
