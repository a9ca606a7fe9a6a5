"""Parameters that are not trained: no layout changes them, and a checkpoint has them once, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsmoe.checkpoint.manifest import Manifest
from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train import Trainer, trainer
from tests.helpers.checkpoint_runs import folder_of, go_on_with, layout_config, take_steps, tensors_of
from tests.helpers.small_runs import make_trainer

EXPERTS = "blocks.1.ffn.deepspeed_moe.experts"
FROZEN = {"embedding.weight", "norm.weight", f"{EXPERTS}.down"}
"""Parameters cut over the tensor group, on every rank, and cut over the experts."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {"ranks": 1, "zero": 0},
    "1 rank, bf16": {"ranks": 1, "zero": 0, "precision": "bf16"},
    "expert 2, ZeRO 1": {"ranks": 2, "expert": 2, "zero": 1, "precision": "bf16"},
    "data 2, ZeRO 2": {"ranks": 2, "zero": 2},
    "tensor 2, ZeRO 1": {"ranks": 2, "tensor": 2, "expert": 2, "zero": 1},
}
BEFORE, AFTER = 2, 2


def frozen_trainer(config: Config) -> Trainer:
    """A trainer of a model some parameters of which are frozen before DeepSpeed sees it."""
    build = trainer.build_model

    def build_frozen(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in FROZEN)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_model", build_frozen)
        return make_trainer(config)


def save_frozen(config: Config) -> dict[str, Any]:
    """Train, save before the first step and after some, and train on; the figures of the later steps."""
    trainer = frozen_trainer(config)
    trainer.save()
    take_steps(trainer, BEFORE)
    trainer.save()
    figures = take_steps(trainer, AFTER)
    trainer.checkpoints.flush()
    return figures


def go_on_frozen(config: Config, checkpoint: Path) -> dict[str, Any]:
    return go_on_with(frozen_trainer(config), checkpoint, AFTER)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("expert 2, ZeRO 1", "expert 2, ZeRO 1"),
        ("expert 2, ZeRO 1", "1 rank, bf16"),
        ("data 2, ZeRO 2", "tensor 2, ZeRO 1"),
        ("tensor 2, ZeRO 1", "1 rank"),
    ],
)
def test_a_run_with_frozen_parameters_goes_on_on_another_layout(saved: str, resumed: str, tmp_path: Path) -> None:
    saving = layout_config(tmp_path, **LAYOUTS[saved], runs_dir=str(tmp_path / "there"))
    (figures, *_) = run_ranks(saving.cluster.devices_per_node, save_frozen, saving)
    first, checkpoint = (folder_of(saving) / f"step_{step:08d}" for step in (0, BEFORE))
    before, after = tensors_of(first), tensors_of(checkpoint)
    for key in (key for key in before if key.startswith("model/")):
        assert torch.equal(before[key], after[key]) == (key.removeprefix("model/") in FROZEN), key
    trained = {key.partition("/")[2] for key in after if key.startswith("exp_avg/")}
    assert trained == {key.removeprefix("model/") for key in after if key.startswith("model/")} - FROZEN
    stored = "BF16" if saving.train.precision == "bf16" else "F32"
    assert {Manifest.read(checkpoint).tensors[f"model/{name}"].dtype for name in FROZEN} == {stored}

    resuming = layout_config(tmp_path, **LAYOUTS[resumed], runs_dir=str(tmp_path / "here"))
    (continued, *_) = run_ranks(resuming.cluster.devices_per_node, go_on_frozen, resuming, checkpoint)
    again = tensors_of(folder_of(resuming) / checkpoint.name)
    for key in (key for key in after if not key.startswith("rng/")):
        assert torch.equal(again[key], after[key]), key
    if saved == resumed:
        assert continued == figures
    else:
        relative = 2e-3 if saving.train.precision == "bf16" else 1e-5
        assert continued["losses"] == pytest.approx(figures["losses"], rel=relative)
        assert continued["norms"] == pytest.approx(figures["norms"], rel=4 * relative)
