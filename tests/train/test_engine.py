"""What `dsmoe.initialize` tells DeepSpeed: parameter groups, generated config, clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsmoe import MoE
from dsmoe.train.engine import parameter_groups
from tests.ranks import run_ranks
from tests.train.layouts import make_trainer, small_config


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.sparse = MoE(8, expert=nn.Linear(8, 8), num_experts=4, k=2)


def test_groups_separate_experts_and_decay_only_matrices() -> None:
    model = Mixed()
    groups = parameter_groups(model, weight_decay=0.1)
    named = {id(p): name for name, p in model.named_parameters()}
    found = {
        (group["name"], group["moe"], group["weight_decay"]): sorted(named[id(p)] for p in group["params"])
        for group in groups
    }
    experts = "sparse.experts.experts"
    assert found == {
        ("matrices", False, 0.1): ["dense.weight", "sparse.router.weight"],
        ("vectors", False, 0.0): ["dense.bias", "norm.weight"],
        ("ep_size_1", True, 0.1): [f"{experts}.{i}.weight" for i in range(4)],
        ("ep_size_1", True, 0.0): [f"{experts}.{i}.bias" for i in range(4)],
    }


def groups_in_deepspeed(config: Any) -> list[tuple[Any, ...]]:
    trainer = make_trainer(config)
    trainer.step()
    inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    return [(g["name"], g["moe"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in inner.param_groups]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_neither_merges_nor_cuts_the_groups(zero_stage: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2, zero_stage=zero_stage)
    names = [found[:3] for found in run_ranks(2, groups_in_deepspeed, config)[0]]
    assert names == [("matrices", False, 0.1), ("vectors", False, 0.0), ("ep_size_2", True, 0.1)]


def learned_in_bf16(config: Any) -> tuple[list[float], list[float], torch.dtype]:
    trainer = make_trainer(config)
    losses, norms = [], []
    for _ in range(12):
        norms.append(float(trainer.step()))
        losses.append(trainer.meter.read(layer_detail=False)["train/loss"])
    return losses, norms, next(trainer.model.parameters()).dtype


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_bf16_follows_fp32(zero_stage: int, tmp_path: Path) -> None:
    """Same run in both precisions: the same curve to bf16's rounding, with and without accumulation."""
    options = {"ranks": 2, "expert": 2, "zero_stage": zero_stage}
    exact, exact_norms, _ = run_ranks(2, learned_in_bf16, small_config(tmp_path, **options))[0]
    config = small_config(tmp_path / "bf16", **options, train={"precision": "bf16"})
    losses, norms, dtype = run_ranks(2, learned_in_bf16, config)[0]
    assert dtype == torch.bfloat16
    assert losses == pytest.approx(exact, rel=0.04)
    assert norms == pytest.approx(exact_norms, rel=0.1)
