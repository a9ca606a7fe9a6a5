"""Dense feed-forward: of dense blocks, the shared expert and the MLP of a residual MoE."""

from __future__ import annotations

import torch
from torch import nn

from dsmoe.nn.activations import find_activation
from dsmoe.nn.linear import ColumnParallelLinear, RowParallelLinear
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import enter_tensor_parallel_region
from dsmoe.parallel.random_weights import normal_from, seed_of


class FeedForward(nn.Module):
    """down (act(gate x) * up x), or down act(up x) where the activation is not gated, without biases.

    Args:
        hidden_size: D.
        ffn_size: I.
        activation: a name in `dsmoe.nn.activations.ACTIVATIONS`; the gate's rows of `gate_up` stand before the others.
        group: the ranks over which I is cut; None is this one alone.
    """

    def __init__(self, hidden_size: int, ffn_size: int, activation: str, group: TensorGroup | None = None) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.group = group or TensorGroup.alone()
        parts = self.activation.shape.input_matrices
        self.gate_up = ColumnParallelLinear(hidden_size, parts * ffn_size, self.group, parts)
        self.down = RowParallelLinear(ffn_size, hidden_size, self.group)

    def initialise(self, seed: int, std: float, down_std: float) -> None:
        """Draw the weights from N(0, std^2) (`down`: down_std), the same for any number of ranks."""
        normal_from(seed_of(seed, "gate_up"), self.gate_up.weight, std, self.gate_up.shard)
        normal_from(seed_of(seed, "down"), self.down.weight, down_std, self.down.shard)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        z = self.gate_up(enter_tensor_parallel_region(x, self.group))
        if not self.activation.gated:
            return self.down(self.activation.act(z))
        gate, up = z.chunk(2, dim=-1)
        return self.down(self.activation.act(gate) * up)
