"""Step 2, balance: losses that keep the experts evenly used, computed before anything is dropped."""

from __future__ import annotations

from typing import Any

import torch

from dsmoe.moe.router import Routing


def count_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many entries of `experts` name each expert, [E] int64; entries equal to E (masked) are left out.

    `torch.bincount` reads its result's size back to the host, which a training step must not do.
    """
    flat_A = experts.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_A.device)
    return counts.scatter_add_(0, flat_A, torch.ones_like(flat_A))[:num_experts]


def load_balancing_loss(routing: Routing, assigned_E: torch.Tensor) -> torch.Tensor:
    """The Switch/GShard loss E * sum_e f_e * P_e, a scalar that is 1 under perfect balance.

    f_e is the share of the assignments that chose expert e, before dropping, and P_e the mean score of e over the
    tokens (Switch Transformer, eq. 4 to 6; for k > 1, f is divided by k as in GShard, so the optimum stays 1).
    """
    num_experts = assigned_E.numel()
    share_E = assigned_E / assigned_E.sum().clamp(min=1)
    return num_experts * torch.dot(
        share_E.to(routing.scores_TE.dtype), mean_over_tokens(routing.scores_TE, routing.mask_T)
    )


def router_z_loss(routing: Routing) -> torch.Tensor:
    """The mean squared logsumexp of the logits, a scalar that keeps them small (ST-MoE, eq. 5)."""
    return mean_over_tokens(routing.logits_TE.logsumexp(dim=-1).square(), routing.mask_T)


def mean_over_tokens(values: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """The mean of [T, ...] over the tokens that are not masked out."""
    if mask_T is None:
        return values.sum(dim=0) / max(len(values), 1)  # `mean` of no tokens would be NaN
    weight = mask_T.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return (values * weight).sum(dim=0) / mask_T.sum().clamp(min=1)


def attach_loss(output: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `output` unchanged, and let the gradient of `scale * loss` flow when `output`'s does.

    The model's own loss need not know of `loss`, however deep the layer sits (Megatron-Core has the same trick).
    """
    return _AttachLoss.apply(output, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.loss_like = loss.new_ones(())
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad_output, ctx.loss_like * ctx.scale, None
