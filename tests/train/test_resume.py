"""Stopping and going on changes nothing; a damaged or foreign checkpoint is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.train.checkpoint import find_checkpoint
from tests.ranks import run_ranks
from tests.train.layouts import make_trainer, named_weights, small_config

LAYOUTS = [(1, 1, 0, "fp32"), (2, 2, 0, "bf16"), (2, 2, 1, "fp32"), (2, 2, 1, "bf16"), (4, 2, 2, "fp32")]


def train_and_save(config: Config, steps: int) -> dict[str, Any]:
    """`steps` more steps, from the newest checkpoint if there is one, and a checkpoint at the end."""
    trainer = make_trainer(config)
    newest = find_checkpoint(Path(config.runs_dir) / "checkpoints")
    if newest:
        trainer.resume(newest)
    norms = [float(trainer.step()) for _ in range(steps)]
    trainer.save()
    return {"norms": norms, "weights": named_weights(trainer), "random": torch.rand(3), "step": trainer.step_index}


@pytest.mark.parametrize(("ranks", "expert", "zero_stage", "precision"), LAYOUTS)
def test_ten_and_ten_steps_equal_twenty_bit_for_bit(
    ranks: int, expert: int, zero_stage: int, precision: str, tmp_path: Path
) -> None:
    def config(folder: str) -> Config:
        train = {"precision": precision, "steps": 20}
        optimizer = {"schedule": "cosine", "warmup_steps": 4}
        options = {"ranks": ranks, "expert": expert, "zero_stage": zero_stage}
        return small_config(tmp_path / folder, **options, train=train, optimizer=optimizer)

    whole = run_ranks(ranks, train_and_save, config("whole"), 20)
    first = run_ranks(ranks, train_and_save, config("halves"), 10)
    second = run_ranks(ranks, train_and_save, config("halves"), 10)
    for at_once, before, after in zip(whole, first, second, strict=True):
        assert after["step"] == at_once["step"] == 20
        assert before["norms"] + after["norms"] == at_once["norms"]
        for name, weight in at_once["weights"].items():
            assert torch.equal(after["weights"][name], weight), name


def resume_from(config: Config, checkpoint: Path) -> str:
    try:
        make_trainer(config).resume(checkpoint)
    except UserError as error:
        return str(error)
    return "resumed"


def test_other_layouts_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2)
    run_ranks(2, train_and_save, config, 2)
    checkpoint = Path(config.runs_dir) / "checkpoints" / "step_00000002"

    (message,) = run_ranks(1, resume_from, small_config(tmp_path), checkpoint)
    assert "ranks: saved 2, now 1" in message
    assert "expert: saved 2, now 1" in message

    damaged = checkpoint / "rank_00001.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for message in run_ranks(2, resume_from, config, checkpoint):
        assert str(damaged) in message


def save_often(config: Config) -> list[str]:
    trainer = make_trainer(config)
    for _ in range(4):
        trainer.step()
        trainer.save()
    return sorted(path.name for path in (Path(config.runs_dir) / "checkpoints").iterdir())


def test_only_the_newest_are_kept_and_nothing_partial_is_left(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint={"keep": 2})
    assert run_ranks(1, save_often, config) == [["step_00000003", "step_00000004"]]


def test_a_partial_checkpoint_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / ".step_00000007.partial").mkdir()
    (tmp_path / "step_00000005").mkdir()
    assert find_checkpoint(tmp_path) is None
