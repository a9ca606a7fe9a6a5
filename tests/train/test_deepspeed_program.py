"""A plain DeepSpeed MoE program trains when only the import is changed."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from dsmoe import MoE  # was: from deepspeed.moe.layer import MoE
from dsmoe.runtime.spawn import run_ranks


class Program(nn.Module):
    """As in DeepSpeed's own examples: the layer's loss is added by the model."""

    def __init__(self, num_experts: int, ep_size: int, k: int, use_residual: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        expert = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.moe = MoE(16, expert, num_experts=num_experts, ep_size=ep_size, k=k, use_residual=use_residual)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden, aux_loss, _ = self.moe(self.inner(x))
        return nn.functional.cross_entropy(self.head(hidden).float(), y) + 0.01 * aux_loss


def train_program(zero_stage: int, k: int, use_residual: bool, precision: str) -> list[float]:
    torch.manual_seed(1)
    model = Program(num_experts=4, ep_size=2, k=k, use_residual=use_residual)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    torch.manual_seed(2 + torch.distributed.get_rank())
    x = torch.randn(32, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    y = x[:, :4].argmax(dim=-1)
    losses = []
    for _ in range(25):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    ("zero_stage", "k", "use_residual", "precision"),
    [(1, 1, False, "fp32"), (2, 2, False, "fp32"), (1, 2, True, "bf16"), (2, 1, True, "fp32")],
)
def test_swapping_the_import_trains(zero_stage: int, k: int, use_residual: bool, precision: str) -> None:
    for losses in run_ranks(2, train_program, zero_stage, k, use_residual, precision):
        assert losses[-1] < 0.5 * losses[0], losses
