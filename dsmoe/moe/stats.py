"""Step 7, count: sums of the router's decisions, kept on the device and read on log steps.

Everything is a sum over tokens, micro-batches and ranks, so one vector per layer and one all-reduce give the global
figures, whatever the layout.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dsmoe.moe.balance import BalanceLosses, mean_over_tokens
from dsmoe.moe.capacity import Assignments
from dsmoe.moe.replay import unless_repeating
from dsmoe.moe.router import Routing

_SCALARS = (
    "weight",
    "dropped_weight",
    "balance_loss",
    "z_loss",
    "square_logit",
    "tokens",
    "micro_batches",
    "slots",
)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's sums since they were cleared.

    `assigned_E`, `kept_E` count assignments before and after dropping; `score_E` sums the router's scores,
    normalised over the experts, over tokens; `weight` and `dropped_weight` sum router weights; the losses are summed
    over micro-batches (unweighted); `square_logit` sums each token's mean squared logit; `slots` counts the rows that
    the capacity provides (assignments themselves where dropless).
    """

    assigned_E: torch.Tensor
    kept_E: torch.Tensor
    score_E: torch.Tensor
    weight: float
    dropped_weight: float
    balance_loss: float
    z_loss: float
    square_logit: float
    tokens: float
    micro_batches: float
    slots: float


class RoutingStatistics(nn.Module):
    """The running sums of one MoE layer, a float64 buffer [3 E + 8] that is not part of checkpoints."""

    sums: torch.Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer(
            "sums", torch.zeros(3 * num_experts + len(_SCALARS), dtype=torch.float64), persistent=False
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutingStatistics:
        """Move with the model, but stay float64: after `model.bfloat16()` a count of 257 would be 256."""
        exact = self.sums
        super()._apply(fn, recurse)
        if self.sums.dtype != exact.dtype:
            self.sums = exact.to(self.sums.device)
        return self

    @torch.no_grad()
    def count(self, routing: Routing, assignments: Assignments, losses: BalanceLosses) -> None:
        """Add one micro-batch; nothing is read back to the host.

        Do not call in a recomputation; compiled code may, and then adds nothing.
        """
        weights_A = routing.weights_TK.reshape(-1)
        # Masked assignments (expert E) are neither kept nor dropped.
        dropped_A = (assignments.expert_A < self.num_experts) & ~assignments.kept_A
        # Dropless: a row for every assignment, so that no place is empty.
        slots = assignments.assigned_E.sum()
        num_tokens = routing.mask_T.sum() if routing.mask_T is not None else slots.new_full((), len(routing.weights_TK))
        if assignments.capacity is not None:
            slots = slots.new_full((), assignments.capacity * self.num_experts)
        scalars = [
            # Masked choices have weight 0.
            weights_A.sum(),
            # The weights are token-major, and the flags sorted by expert.
            (weights_A[assignments.order_A] * dropped_A).sum(),
            losses.balance,
            losses.z,
            # The mean over unmasked tokens times their number is a sum, which micro-batches and ranks can add up.
            mean_over_tokens(routing.logits_TE.square().mean(dim=-1), routing.mask_T) * num_tokens,
            num_tokens,
            # Counts micro-batches, by which the summed losses are divided.
            torch.ones_like(losses.balance),
            slots,
        ]
        # One vector, so that all figures of all layers are one all-reduce; float64, so that counts stay exact.
        sums = torch.cat(
            [
                assignments.assigned_E.double(),
                assignments.kept_E.double(),
                mean_over_tokens(routing.probabilities_TE, routing.mask_T).double() * num_tokens,
                torch.stack([value.double() for value in scalars]),
            ]
        )
        self.sums += unless_repeating(sums) if torch.compiler.is_compiling() else sums

    @property
    def assigned(self) -> torch.Tensor:
        """This rank's assignments per expert before dropping, [E] float64 on the device."""
        return self.sums[: self.num_experts]

    def clear(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()


def read_statistics(sums: torch.Tensor, num_experts: int) -> LayerStatistics:
    """Return the figures in a vector of sums, which is reduced over ranks and on the CPU."""
    assigned_E, kept_E, score_E, scalars = sums.split([num_experts, num_experts, num_experts, len(_SCALARS)])
    return LayerStatistics(assigned_E, kept_E, score_E, **dict(zip(_SCALARS, scalars.tolist(), strict=True)))
