"""Step 3, limit: the assignments that each expert accepts, sorted by expert.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dsmoe.config import schema
from dsmoe.config.errors import refuse
from dsmoe.config.registry import entry_named
from dsmoe.config.sections.moe import capacity_problems
from dsmoe.kernels import on_gpu
from dsmoe.moe.balance import count_experts
from dsmoe.moe.replay import uniform
from dsmoe.moe.router import Routing

DROPS = 1
"""Added to the key of a forward pass for random drops, so that they are independent of its noise."""
LARGEST_MOVE = 0.03
"""The most that `DropRateController.update` changes the factor by at once, as a share of it."""


@dataclass(frozen=True)
class DropPolicy:
    """The choice of the assignments that stay where an expert has more than its capacity.

    Attributes:
        rank: takes the routing and the key to draw from, and returns a number per assignment [A], token-major. The
            highest stay, and of equals the earlier; None keeps the first in sequence order.
        is_random: True if it draws anything.
    """

    rank: Callable[[Routing, torch.Tensor | None], torch.Tensor] | None
    is_random: bool = False


def _by_weight(routing: Routing, _: torch.Tensor | None) -> torch.Tensor:
    # Only sorted by, which has no gradient.
    return routing.weights_TK.detach().reshape(-1)


def _by_lot(routing: Routing, key: torch.Tensor | None) -> torch.Tensor:
    experts_A = routing.experts_TK.reshape(-1)
    return uniform(None if key is None else key + DROPS, experts_A.shape, experts_A.device)


DROP_POLICIES = {
    "probability": DropPolicy(_by_weight),
    "position": DropPolicy(rank=None),
    "random": DropPolicy(_by_lot, is_random=True),
}
"""The highest router weights stay, the first in sequence order, or any with equal chance."""


@dataclass(frozen=True)
class Assignments:
    """All A = T * K assignments of this rank, sorted by expert and, within an expert, by who stays first.

    Example: T = 4, K = 2, E = 4, C = 3, the first in sequence order stay.

        experts_TK    [[1, 0], [1, 2], [0, 1], [3, 1]]
        order_A       1 4 | 0 2 5 7 | 3 | 6             token * 2 + choice
        expert_A      0 0 | 1 1 1 1 | 2 | 3
        place_A       0 1 | 0 1 2 3 | 0 | 0             kept below 3: the second choice of token 3 is dropped
        assigned_E    [2, 4, 1, 1]                      kept_E [2, 3, 1, 1]

    Attributes:
        order_A: token-major indices (token * K + choice), in sorted order as all tensors here with A.
        expert_A: the expert; E for masked tokens.
        place_A: the place within the expert, from 0.
        kept_A: True if within the capacity.
        assigned_E: assignments before dropping.
        kept_E: assignments after dropping.
        capacity: C; None is dropless.
        num_choices: K.
        complete: nothing can be missing (dropless, no mask), which is known without a look at the device.
        slots: the capacity for as many tokens as any rank may bring; None where that is not known.
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
    slots: int | None = None

    @classmethod
    def all_kept(cls, experts_TK: torch.Tensor, num_experts: int, complete: bool = False) -> Assignments:
        """Sort choices that are all kept; E is no expert."""
        # Choices that were dropped before carry E: they sort last, and count nowhere.
        counts_E = count_experts(experts_TK, num_experts)
        order_A, expert_A, place_A = _by_expert(experts_TK.reshape(-1), counts_E)
        kept_A = expert_A < num_experts
        return cls(order_A, expert_A, place_A, kept_A, counts_E, counts_E, None, experts_TK.shape[1], complete)

    def kept_experts(self) -> torch.Tensor:
        """Return the expert of each choice, [T, K]; E where it is dropped or masked."""
        # For exchanges that sort anew, by chunk or by node: the order by expert is of no use to them.
        expert_A = torch.where(self.kept_A, self.expert_A, self.assigned_E.numel())
        return torch.empty_like(expert_A).scatter_(0, self.order_A, expert_A).view(-1, self.num_choices)


class DropRateController(nn.Module):
    """Moves a capacity factor slowly so that a given share of the assignments is dropped.

    An integral controller: one percentage point too many dropped raises the factor by one percent, at most
    `LARGEST_MOVE` at once, never above the ceiling. It works with numbers that the host has on log steps anyway.

    Args:
        factor: the first factor.
        target_percent: the share of the assignments to drop.
        max_factor: the ceiling, which bounds the memory.

    Attributes:
        factor: the present factor, the same on every rank. Saved with the model.
    """

    def __init__(self, factor: float, target_percent: float, max_factor: float) -> None:
        super().__init__()
        self._factor = _text(factor)
        self.target_percent = target_percent
        self.max_factor = max_factor

    @property
    def factor(self) -> float:
        """The present factor."""
        return float(self._factor)

    @factor.setter
    def factor(self, value: float) -> None:
        self._factor = _text(value)

    def update(self, dropped_percent: float) -> None:
        """Move the factor by the share that all ranks dropped in the step that is logged."""
        if not 0 <= dropped_percent <= 100:
            raise ValueError(f"the dropped share must be between 0 and 100 percent, not {dropped_percent}")
        # 12 % dropped of a wanted 10 %: the factor grows by 2 %, so that less is dropped.
        # Bounded per update, since the rate of one logged step is noisy.
        move = (dropped_percent - self.target_percent) / 100
        self.factor = min(self.factor * (1 + min(max(move, -LARGEST_MOVE), LARGEST_MOVE)), self.max_factor)

    def get_extra_state(self) -> torch.Tensor:
        """Return the state that `state_dict` saves: a CPU tensor, since a buffer would move to the device."""
        # float64 holds a Python float exactly, so that a resumed run has the same factor, and the same capacities.
        return torch.tensor(self.factor, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore a saved factor."""
        self.factor = float(state)


class Capacity(nn.Module):
    """The limit of each expert, the drops, and the weights of the remaining choices.

    Args:
        num_experts: E.
        top_k: K.
        options: the factors (see `expert_capacity`) and the policy. With `target_drop_percent` a `DropRateController`
            moves the factor in training, from `factor` up to `max_factor`, to hold that drop rate.
        max_tokens: the most tokens that any rank brings to a forward pass; None where that is not known beforehand.

    Attributes:
        controller: the `DropRateController`, or None.
        drop_policy: the entry of `DROP_POLICIES`.
    """

    def __init__(self, num_experts: int, top_k: int, options: schema.Capacity, max_tokens: int | None = None) -> None:
        super().__init__()
        refuse(capacity_problems(options))
        self.num_experts, self.top_k = num_experts, top_k
        self.options = options
        self._factor = None if options.factor is None else _text(options.factor)
        self._eval_factor = None if options.eval_factor is None else _text(options.eval_factor)
        self.drop_policy = entry_named(DROP_POLICIES, "moe.capacity.drop_policy", options.drop_policy)
        self.max_tokens = max_tokens
        self.controller: DropRateController | None = None
        if options.target_drop_percent is not None:
            assert options.factor is not None, "checked by `capacity_problems`"
            self.controller = DropRateController(options.factor, options.target_drop_percent, options.max_factor)

    @property
    def factor(self) -> float | None:
        """The factor in training."""
        # The controller moves; `options.factor` is only where it began.
        if self.controller is not None:
            return self.controller.factor
        return None if self._factor is None else float(self._factor)

    @property
    def eval_factor(self) -> float | None:
        """The factor in evaluation."""
        return None if self._eval_factor is None else float(self._eval_factor)

    def capacity_for(self, num_tokens: int) -> int | None:
        """Return C for this many tokens, in training or evaluation as the module is; see `expert_capacity`."""
        factor = self.factor if self.training else self.eval_factor
        return expert_capacity(num_tokens, self.top_k, self.num_experts, factor, self.options.minimum)

    def forward(self, routing: Routing, assigned_E: torch.Tensor, key: torch.Tensor | None) -> Assignments:
        """Sort the assignments by expert and keep as many as the capacity for this many tokens allows."""
        capacity = self.capacity_for(len(routing.experts_TK))
        assignments = limit(routing, assigned_E, capacity, self.drop_policy, key)
        if self.max_tokens is None:
            return assignments
        # The padded exchange then has one size for all ranks, also where they bring fewer tokens.
        return dataclasses.replace(assignments, slots=self.capacity_for(self.max_tokens))

    def weights(self, routing: Routing, assignments: Assignments) -> torch.Tensor:
        """Return the weights [T, K] of the experts' outputs; those of dropped choices have no effect."""
        # Dropless: every token has all its choices, and nothing to make up for.
        if not self.options.renormalize_dropped or assignments.capacity is None:
            return routing.weights_TK
        return renormalize(routing.weights_TK, assignments)


def _text(factor: float) -> str:
    """Return a factor as the text that a module keeps.

    Where torch.compile has dynamic shapes, a number would be a variable of the graph, and the number of the experts'
    rows a size that cannot enter their autograd function. A text is a constant: another one is compiled anew.
    """
    return repr(float(factor))


def chunk_of_tokens(num_tokens: int, num_chunks: int, device: torch.device) -> torch.Tensor:
    """Return the chunk of each token, [T]: runs of neighbours, of equal lengths or nearly so."""
    return torch.arange(num_tokens, device=device) * num_chunks // max(num_tokens, 1)


def by_chunk(experts_TK: torch.Tensor, num_experts: int, num_chunks: int) -> torch.Tensor:
    """Return the expert of each choice, [T, K], as if each chunk of tokens had its own: e of chunk x is x * E + e.

    Sorting by these experts sorts by (chunk, expert). E, which is no expert, becomes X * E.

    Example: T = 4, E = 2, two chunks: [[0], [1], [2], [1]] becomes [[0], [1], [4], [3]].
    """
    if num_chunks == 1:
        return experts_TK
    chunk_T = chunk_of_tokens(len(experts_TK), num_chunks, experts_TK.device)
    own_TK = experts_TK + chunk_T[:, None] * num_experts
    return torch.where(experts_TK < num_experts, own_TK, num_chunks * num_experts)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float | None, minimum: int) -> int | None:
    """Return C = max(minimum, ceil(T * K / E * factor)) assignments per expert and source rank; None is dropless.

    A token chooses an expert at most once, so C never exceeds T.
    """
    if factor is None:
        return None
    wanted = math.ceil(num_tokens * top_k / num_experts * factor)
    # At least 1 even without tokens: a padded exchange of no places would have no chunk.
    return min(max(minimum, wanted), max(num_tokens, 1))


# With ranks, C = 2: four assignments of experts 1 0 1 1 with weights .2 .9 .5 .2.
#   by_rank_A  1 2 0 3        by falling weight; of equals, 0 before 3
#   expert_A   0 | 1 1 1      sorted by expert, stably
#   order_A    1 | 2 0 3      in terms of the unsorted assignments
#   place_A    0 | 0 1 2      assignment 3 is dropped
def limit(
    routing: Routing,
    assigned_E: torch.Tensor,
    capacity: int | None,
    drop_policy: DropPolicy,
    key: torch.Tensor | None = None,
) -> Assignments:
    """Sort the assignments by expert and keep the first `capacity` of each.

    Args:
        routing: the choices.
        assigned_E: the assignments of each expert.
        capacity: C, or None to keep all.
        drop_policy: an entry of `DROP_POLICIES`. Position decides between equal ranks, so the kept ones are exact and,
            random policies aside, the same on every device.
        key: the key of random drops (see `dsmoe.moe.replay`); None draws from torch's generator.
    """
    flat_A = routing.experts_TK.reshape(-1)
    num_experts = assigned_E.numel()
    rank_A = None
    # Dropless: nothing to decide, so nothing is drawn.
    if capacity is not None and drop_policy.rank is not None:
        rank_A = drop_policy.rank(routing, key)
    if rank_A is None:
        order_A, expert_A, place_A = _by_expert(flat_A, assigned_E)
    else:
        # Two stable sorts, by rank and then by expert, leave each expert's assignments in the order of their ranks.
        by_rank_A = rank_A.argsort(descending=True, stable=True)
        order_A, expert_A, place_A = _by_expert(flat_A[by_rank_A], assigned_E)
        order_A = by_rank_A[order_A]
    # Masked assignments have expert E.
    kept_A = expert_A < num_experts
    kept_E = assigned_E
    if capacity is not None:
        kept_A = kept_A & (place_A < capacity)
        kept_E = assigned_E.clamp(max=capacity)  # what `kept_A` sums to per expert, without a scatter
    # Known on the host without a read: what may be missing decides which code runs, not how many are missing.
    complete = capacity is None and routing.mask_T is None
    num_choices = routing.experts_TK.shape[1]
    return Assignments(order_A, expert_A, place_A, kept_A, assigned_E, kept_E, capacity, num_choices, complete)


def _by_expert(expert_A: torch.Tensor, assigned_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a stable order by expert, and in that order the expert and the place within it."""
    if on_gpu(expert_A):
        # The kernel counts once more rather than take `assigned_E`: the scan needs counts per block.
        from dsmoe.kernels.permute import sort_by_expert

        return sort_by_expert(expert_A, assigned_E.numel())[1:]
    order_A = expert_A.argsort(stable=True)
    expert_A = expert_A[order_A]
    # The place in the sorted list minus the begin of the expert's run is the place within the expert.
    # Masked assignments carry expert E: they sort last, behind the end of the last real expert.
    firsts = torch.cat([assigned_E.new_zeros(1), assigned_E.cumsum(0)])
    return order_A, expert_A, torch.arange(expert_A.numel(), device=expert_A.device) - firsts[expert_A]


def spread_over_slices(assignments: Assignments, num_slices: int, num_local_experts: int) -> Assignments:
    """Return the assignments of a layer whose experts are cut into slices on `num_slices` neighbouring ranks.

    An expert's output is the sum of its slices' outputs, so each slice is an expert of its own which every token of
    the whole expert chooses with the same weight: choice k becomes the choices k * num_slices, ..., one per slice.
    Experts are numbered by rank and, on each, as before. Unlike `limit`, this leaves them in no order.

    Example: 4 experts, 2 on each rank, in 2 slices: ranks 0 and 1 have the slices of experts 0 and 1 as 0 1 and 2 3,
    ranks 2 and 3 those of experts 2 and 3 as 4 5 and 6 7. A token of expert 2 chooses 4 and 6, one of expert 0 chooses
    0 and 2.
    """
    slices = torch.arange(num_slices, device=assignments.order_A.device)
    # Expert e of rank r = e // L becomes expert e of rank r * num_slices: (num_slices - 1) * L further per rank.
    first_A = assignments.expert_A // num_local_experts * (num_slices - 1) * num_local_experts + assignments.expert_A
    number_AR = first_A[:, None] + slices * num_local_experts
    num_experts = assignments.assigned_E.numel() * num_slices

    # [ranks * L] to [ranks, slices, L], flat: the order in which the slices are numbered.
    def each(counts_E: torch.Tensor) -> torch.Tensor:
        return counts_E.view(-1, 1, num_local_experts).expand(-1, num_slices, -1).flatten()

    return dataclasses.replace(
        assignments,
        # token * K + k becomes token * K * slices + k * slices + slice: still token-major.
        order_A=(assignments.order_A[:, None] * num_slices + slices).flatten(),
        expert_A=number_AR.flatten().clamp(max=num_experts),  # masked ones have no expert in any slice
        # Every slice has the assignments of the whole expert, and so the same places and drops.
        place_A=assignments.place_A.repeat_interleave(num_slices),
        kept_A=assignments.kept_A.repeat_interleave(num_slices),
        assigned_E=each(assignments.assigned_E),
        kept_E=each(assignments.kept_E),
        num_choices=assignments.num_choices * num_slices,
    )


def renormalize(weights_TK: torch.Tensor, assignments: Assignments) -> torch.Tensor:
    """Give a token's kept choices the weight of all its choices, each in proportion; the dropped get 0.

    w'_k = w_k * sum_j w_j / sum_(j kept) w_j. With normalised weights, that is w_k over the sum of the kept, times
    `scale`; without, a token that loses nothing keeps its weights. A token that loses all its choices has weights 0.
    """
    # From sorted back to token-major order.
    kept_A = torch.empty_like(assignments.kept_A).scatter_(0, assignments.order_A, assignments.kept_A)
    kept_TK = torch.where(kept_A.view_as(weights_TK), weights_TK, 0.0)
    kept_T1 = kept_TK.sum(dim=1, keepdim=True)
    # The number of kept choices modulo K is 0 for none and for all of them.
    # Exactly 1 where nothing was dropped or nothing kept: no rounding, and no division by zero in the gradient.
    partly_T1 = (kept_A.view_as(weights_TK).sum(dim=1, keepdim=True) % weights_TK.shape[1] != 0) & (kept_T1 > 0)
    whole_T1 = weights_TK.sum(dim=1, keepdim=True)
    # The inner `where` is for the gradient: the branch not taken has one too, and 0 times infinity in it is NaN.
    return kept_TK * torch.where(partly_T1, whole_T1 / torch.where(partly_T1, kept_T1, 1.0), 1.0)
