"""Stopping and going on on the same layout changes nothing, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.checkpoint.folder import candidates
from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train import Trainer
from tests.helpers.checkpoint_runs import tensors_of
from tests.helpers.small_runs import make_trainer, small_config

SPLIT = {"tensor": 2, "sequence": True}
LAYOUTS = [  # tests/checkpoint/test_elastic.py has more, three steps each
    (1, 1, 0, "fp32", {}),
    (2, 2, 1, "bf16", {}),
    (4, 4, 1, "fp32", SPLIT),
]


def own_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What this rank holds, buffers included."""
    model = trainer.model
    return {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def train_and_save(config: Config, steps: int) -> dict[str, Any]:
    """`steps` more steps, from the newest checkpoint if there is one, and a checkpoint at the end."""
    trainer = make_trainer(config)
    for newest in candidates(Path(config.runs_dir) / "checkpoints")[0][:1]:
        trainer.resume(newest)
    norms, factors = [], []
    for _ in range(steps):
        norms.append(float(trainer.step()))
        trainer.log(norms[-1])
        factors.append(trainer.moe_layers[0].limit.factor)
    trainer.save()
    trainer.checkpoints.flush()
    weights = own_weights(trainer)
    return {"norms": norms, "factors": factors, "weights": weights, "step": trainer.step_index}


@pytest.mark.parametrize(("ranks", "expert", "zero_stage", "precision", "parallel"), LAYOUTS)
def test_five_and_five_steps_equal_ten_bit_for_bit(
    ranks: int,
    expert: int,
    zero_stage: int,
    precision: str,
    parallel: dict[str, Any],
    tmp_path: Path,
) -> None:
    def config(folder: str) -> Config:
        train = {"precision": precision, "steps": 10}
        optimizer = {"schedule": "cosine", "warmup_steps": 3}
        moe = {"capacity": {"factor": 1.0}}  # with dropping
        options = {"ranks": ranks, "expert": expert, "zero_stage": zero_stage, "parallel": parallel}
        sections = {"train": train, "optimizer": optimizer, "moe": moe}
        return small_config(tmp_path / folder, **options, **sections)

    whole = run_ranks(ranks, train_and_save, config("whole"), 10)
    first = run_ranks(ranks, train_and_save, config("halves"), 5)
    second = run_ranks(ranks, train_and_save, config("halves"), 5)
    for at_once, before, after in zip(whole, first, second, strict=True):
        assert after["step"] == at_once["step"] == 10
        assert before["norms"] + after["norms"] == at_once["norms"]
        for name, weight in at_once["weights"].items():
            assert torch.equal(after["weights"][name], weight), name


EVERYTHING = {  # whatever is random in the MoE layers, or carried from step to step
    "num_experts": 4,
    "top_k": 2,
    "expert_ffn_size": 24,
    "router": {"noise": "gumbel", "score": "sigmoid"},
    "balance": {"aux_loss": 0.02, "scope": "global", "bias_update_rate": 0.01},
    "capacity": {"factor": 1.0, "minimum": 1, "drop_policy": "random", "target_drop_percent": 5.0, "pad": False},
}


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bf16", 2)])
def test_what_is_random_or_carried_on_in_the_layers_continues_as_well(
    precision: str, zero_stage: int, tmp_path: Path
) -> None:
    def config(folder: str) -> Config:
        train = {"precision": precision, "recompute": "full"}
        return small_config(tmp_path / folder, ranks=2, expert=2, zero_stage=zero_stage, moe=EVERYTHING, train=train)

    whole = run_ranks(2, train_and_save, config("whole"), 6)
    first = run_ranks(2, train_and_save, config("halves"), 3)
    second = run_ranks(2, train_and_save, config("halves"), 3)
    for at_once, before, after in zip(whole, first, second, strict=True):
        assert before["norms"] + after["norms"] == at_once["norms"]
        assert before["factors"] + after["factors"] == at_once["factors"]
        assert len(set(at_once["factors"])) > 3, "the factor moved"
        assert at_once["weights"]["blocks.1.ffn.balance.bias"].abs().max() > 0.01
        for name, weight in at_once["weights"].items():
            assert torch.equal(after["weights"][name], weight), name
        assert at_once["factors"] == whole[0]["factors"]
        for name in ("bias", "load_share"):
            name = f"blocks.1.ffn.balance.{name}"
            assert torch.equal(at_once["weights"][name], whole[0]["weights"][name]), "the same on every rank"


@pytest.mark.parametrize("dense", [{"shared_expert_ffn_size": 40}, {"residual": True}])
def test_what_every_token_passes_is_saved_with_its_optimizer_state(dense: dict[str, Any], tmp_path: Path) -> None:
    def config(folder: str) -> Config:
        return small_config(tmp_path / folder, ranks=2, expert=2, zero_stage=2, moe=dense)

    whole = run_ranks(2, train_and_save, config("whole"), 6)
    run_ranks(2, train_and_save, config("halves"), 3)
    second = run_ranks(2, train_and_save, config("halves"), 3)
    saved = tensors_of(Path(config("halves").runs_dir) / "checkpoints" / "step_00000006")
    names = {
        name for name in whole[1]["weights"] if any(part in name for part in (".shared.", ".mlp.", ".coefficient"))
    }
    assert len(names) == (4 if "residual" in dense else 2)
    for at_once, after in zip(whole, second, strict=True):
        for name, weight in at_once["weights"].items():
            assert torch.equal(after["weights"][name], weight), name
    for name in names:
        assert torch.equal(saved[f"model/{name}"], whole[0]["weights"][name]), name


def skip_a_step(config: Config, skipped: int, until: int) -> dict[str, Any]:
    """Train with an infinite gradient in step `skipped`, from the newest checkpoint if there is one."""
    trainer = make_trainer(config)
    for newest in candidates(Path(config.runs_dir) / "checkpoints")[0][:1]:
        trainer.resume(newest)
    rates = []
    while trainer.step_index < until:
        hook = None
        if trainer.step_index == skipped:
            hook = trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        trainer.step()
        rates.append(trainer.used_learning_rate)
        if hook:
            hook.remove()
    trainer.save()
    trainer.checkpoints.flush()
    return {"rates": rates, "weights": own_weights(trainer), "skipped": trainer.engine.skipped_steps}


def test_a_skipped_step_is_resumed_exactly_too(tmp_path: Path) -> None:
    def config(folder: str) -> Config:
        options = {"train": {"steps": 8}, "optimizer": {"schedule": "linear", "warmup_steps": 4}}
        return small_config(tmp_path / folder, **options)

    (whole,) = run_ranks(1, skip_a_step, config("whole"), 2, 8)
    run_ranks(1, skip_a_step, config("halves"), 2, 4)
    (second,) = run_ranks(1, skip_a_step, config("halves"), 2, 8)
    assert whole["skipped"] == second["skipped"] == 1
    assert whole["rates"][2] == whole["rates"][3], "a skipped step does not advance the schedule"
    assert second["rates"] == whole["rates"][4:]
    assert all(torch.equal(second["weights"][name], weight) for name, weight in whole["weights"].items())
