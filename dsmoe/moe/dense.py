"""A feed-forward that every token passes: the dense blocks, the shared expert, the MLP of a residual MoE.

Shape suffixes: see `dsmoe.moe.router`.
"""

from __future__ import annotations

import torch
from torch import nn

from dsmoe.moe.ffn import ACTIVATIONS


class FeedForward(nn.Module):
    """down (act(gate x) * up x), or down act(up x) where the activation is not gated, without biases.

    Args:
        hidden_size: D.
        ffn_size: I.
        activation: a name in `dsmoe.moe.ffn.ACTIVATIONS`; the gate's rows of `gate_up` stand before the others.
    """

    def __init__(self, hidden_size: int, ffn_size: int, activation: str = "swiglu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = ACTIVATIONS[activation]
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size if self.activation.gated else ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        z = self.gate_up(x)
        if not self.activation.gated:
            return self.down(self.activation.act(z))
        gate, up = z.chunk(2, dim=-1)
        return self.down(self.activation.act(gate) * up)


def join_dense(
    y_TD: torch.Tensor, dense_TD: torch.Tensor, mix_T2: torch.Tensor | None, mask_T: torch.Tensor | None
) -> torch.Tensor:
    """Bring the experts' output and the dense one together: [T, D].

    Args:
        y_TD: of the experts.
        dense_TD: of what every token passes.
        mix_T2: what each of the two counts; None adds them.
        mask_T: where it is False, the output is zero.
    """
    joined_TD = y_TD + dense_TD if mix_T2 is None else y_TD * mix_T2[:, :1] + dense_TD * mix_T2[:, 1:]
    return joined_TD if mask_T is None else joined_TD * mask_T[:, None]
