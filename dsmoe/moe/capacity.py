"""Step 3, limit: which assignments an expert accepts, and in what order they stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dsmoe.moe.router import Routing

DROP_POLICIES = ("probability", "position")


@dataclass(frozen=True)
class Assignments:
    """All A = T * K assignments of this rank, sorted by expert and, within an expert, by who stays first.

    Tensors suffixed A are in that sorted order. `order_A` holds token-major indices (token * K + choice), `expert_A`
    the expert (E for masked tokens), `place_A` the place within the expert from 0, `kept_A` whether it is within the
    capacity. `assigned_E` counts before and `kept_E` after dropping. `num_choices` is K. `complete` says that nothing
    can be missing (dropless, no mask), which is known without looking at the device.
    """

    order_A: torch.Tensor
    expert_A: torch.Tensor
    place_A: torch.Tensor
    kept_A: torch.Tensor
    assigned_E: torch.Tensor
    kept_E: torch.Tensor
    capacity: int | None
    num_choices: int
    complete: bool


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float | None, minimum: int) -> int | None:
    """C = max(minimum, ceil(T * K / E * factor)) assignments per expert and source rank; None is dropless.

    An expert cannot be chosen more than once by a token, so C never exceeds T.
    """
    if factor is None:
        return None
    wanted = math.ceil(num_tokens * top_k / num_experts * factor)
    return min(max(minimum, wanted), max(num_tokens, 1))


def limit(routing: Routing, assigned_E: torch.Tensor, capacity: int | None, drop_policy: str) -> Assignments:
    """Sort the assignments by expert and keep the first `capacity` of each.

    Args:
        routing: the choices.
        assigned_E: how many assignments each expert has.
        capacity: C, or None to keep all.
        drop_policy: `probability` keeps the highest router weights, `position` the first in sequence order. Equal
            weights are settled by position, so what is kept is exact and the same on every device.
    """
    flat_A = routing.experts_TK.reshape(-1)
    num_experts = assigned_E.numel()
    if capacity is not None and drop_policy == "probability":
        by_weight_A = routing.weights_TK.detach().reshape(-1).argsort(descending=True, stable=True)
        order_A = by_weight_A[flat_A[by_weight_A].argsort(stable=True)]
    else:
        order_A = flat_A.argsort(stable=True)
    expert_A = flat_A[order_A]
    # Masked assignments carry expert E: they sort last, behind the end of the last real expert.
    first_E1 = torch.cat([assigned_E.new_zeros(1), assigned_E.cumsum(0)])
    place_A = torch.arange(flat_A.numel(), device=flat_A.device) - first_E1[expert_A]
    kept_A = expert_A < num_experts
    kept_E = assigned_E
    if capacity is not None:
        kept_A = kept_A & (place_A < capacity)
        kept_E = assigned_E.clamp(max=capacity)
    complete = capacity is None and routing.mask_T is None
    num_choices = routing.experts_TK.shape[1]
    return Assignments(order_A, expert_A, place_A, kept_A, assigned_E, kept_E, capacity, num_choices, complete)
