"""Step 1, route: the experts of each token and their weights.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dsmoe.config import schema
from dsmoe.config.errors import refuse
from dsmoe.config.registry import entry_named
from dsmoe.config.sections.moe import choice_problems, group_problems
from dsmoe.kernels import on_gpu
from dsmoe.moe.scores import GROUP_SCORES, NOISES, SCORES, TINY
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import copy_weight_to_tensor_parallel_region


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens.

    Attributes:
        logits_TE: fp32, without bias and Gumbel noise; with jitter, which is in the router's input.
        scores_TE: fp32, of these logits.
        probabilities_TE: the scores by the entry's `over_experts`; they add up to 1.
        weights_TK: fp32, differentiable; in order of falling preference, that is of the score with the additions for
            the choice (bias, Gumbel noise). 0 for tokens that are masked out.
        experts_TK: int64, in the same order; E, which is no expert, for tokens that are masked out. Where experts
            choose, K is E: column e is expert e's, with expert E and weight 0 for the tokens that e did not choose.
        mask_T: bool, False where a token is masked out; None without a mask.
    """

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    probabilities_TE: torch.Tensor
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    mask_T: torch.Tensor | None


class Router(nn.Module):
    """A linear map to one logit per expert, then choices and weights from the logits, with the same rules for every k.

    Everything is computed in fp32 whatever the model's dtype.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, experts per token; the mean over the tokens where experts choose.
        options: the rules from logits to choices and weights. With `num_groups` G above 1, experts stand in G groups of
            E / G neighbours (DeepSeek-V3, sec. 2.1.2: one group per node). Where experts choose (Zhou et al. 2022,
            arXiv 2202.09368), loads are even by construction, but a token's experts depend on the tokens after it.
        tensor_group: the ranks that hold the same weight and each route other tokens of one micro-batch.

    Raises:
        UserError: the options do not fit so many experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        options: schema.Router,
        tensor_group: TensorGroup | None = None,
    ) -> None:
        super().__init__()
        refuse(chain(choice_problems(num_experts, top_k, options), group_problems(num_experts, top_k, options)))
        self.num_experts = num_experts
        self.k = top_k
        self.options = options
        self.score = entry_named(SCORES, "moe.router.score", options.score)
        self.group_score = entry_named(GROUP_SCORES, "moe.router.group_score", options.group_score)
        self.noise = entry_named(NOISES, "moe.router.noise", options.noise)
        self.tensor_group = tensor_group or TensorGroup.alone()
        # On meta, so that torch draws no weight only to have it replaced.
        self.wg = nn.Linear(hidden_size, num_experts, bias=False, device="meta")
        self.wg.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def weight(self) -> nn.Parameter:
        """[E, D]; `wg.weight`, as in DeepSpeed's gate."""
        return cast("nn.Parameter", self.wg.weight)

    def forward(
        self,
        x_TD: torch.Tensor,
        mask_T: torch.Tensor | None = None,
        bias_E: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        capacity: int | None = None,
    ) -> Routing:
        """Route [T, D] tokens of any dtype.

        Args:
            x_TD: the tokens.
            mask_T: bool; False for a token that goes to no expert.
            bias_E: added to the scores for the choice, not for the weights (see `dsmoe.moe.balance.Balance`).
            key: the key of the noise (see `dsmoe.moe.replay`); None draws from torch's generator.
            capacity: C, the tokens that an expert chooses where experts choose.
        """
        # fp32: bf16 logits are too coarse to tell experts of near scores apart.
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and self.noise.on_input is not None:
                x_TD = self.noise.on_input(x_TD, key)
            logits_TE = _Logits.apply(x_TD, copy_weight_to_tensor_parallel_region(self.weight, self.tensor_group))
        decide = self._decide_fused if on_gpu(logits_TE) and self.options.choice == "token" else self._decide
        scores_TE, weights_TK, experts_TK, valid_TK = decide(logits_TE, mask_T, bias_E, key, capacity)
        probabilities_TE = self.score.over_experts(scores_TE)
        # By `where` and not by indexing, so that shapes stay static and the host reads nothing.
        if valid_TK is not None:
            experts_TK = torch.where(valid_TK, experts_TK, self.num_experts)
            weights_TK = torch.where(valid_TK, weights_TK, 0.0)
        return Routing(logits_TE, scores_TE, probabilities_TE, weights_TK, experts_TK, mask_T)

    def _decide(
        self,
        logits_TE: torch.Tensor,
        mask_T: torch.Tensor | None,
        bias_E: torch.Tensor | None,
        key: torch.Tensor | None,
        capacity: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return scores [T, E], weights and experts [T, K], and the valid ones, [T, K] or [T, 1]; None: all."""
        scores_TE = self.score.of_logits(logits_TE)
        # The choice has no gradient; the router learns through the weights of the chosen.
        with torch.no_grad():
            experts_TK, valid_TK = self._choose(logits_TE, scores_TE, mask_T, bias_E, key, capacity)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.options.normalize_weights:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        if self.options.scale != 1.0:
            weights_TK = weights_TK * self.options.scale
        return scores_TE, weights_TK, experts_TK, valid_TK

    def _decide_fused(
        self,
        logits_TE: torch.Tensor,
        mask_T: torch.Tensor | None,
        bias_E: torch.Tensor | None,
        key: torch.Tensor | None,
        _: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Do `_decide` where tokens choose, in one kernel; a preference beyond scores and bias is computed before."""
        from dsmoe.kernels.topk_router import route

        options, preference_TE = self.options, None
        if options.force_balanced or options.num_groups > 1 or (self.training and self.noise.on_choice is not None):
            with torch.no_grad():
                preference_TE = self._preference(logits_TE, self.score.of_logits(logits_TE), mask_T, bias_E, key)
        scores_TE, weights_TK, experts_TK = route(
            logits_TE, bias_E, preference_TE, self.k, self.score, options.normalize_weights, options.scale, TINY
        )
        return scores_TE, weights_TK, experts_TK, None if mask_T is None else mask_T[:, None]

    def _choose(
        self,
        logits_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        mask_T: torch.Tensor | None,
        bias_E: torch.Tensor | None,
        key: torch.Tensor | None,
        capacity: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return experts [T, K] and the valid ones, [T, K] or [T, 1]; None: all."""
        valid_T1 = None if mask_T is None else mask_T[:, None]
        preference_TE = self._preference(logits_TE, scores_TE, mask_T, bias_E, key)
        if self.options.choice == "token":
            return _largest(preference_TE, self.k), valid_T1
        assert capacity is not None, "experts choose as many tokens as they have room for"
        # An expert takes masked tokens last. `valid` drops those that it still has room for.
        if valid_T1 is not None:
            preference_TE = preference_TE.masked_fill(~valid_T1, -torch.inf)
        # A stable sort: the order in which `topk` takes equal scores depends on the device.
        best_CE = preference_TE.argsort(dim=0, descending=True, stable=True)[:capacity]
        valid_TE = torch.zeros_like(preference_TE, dtype=torch.bool).scatter_(0, best_CE, True)
        # K = E here: how many experts take a token is known on the device alone, so all are choices, most not valid.
        experts_TE = torch.arange(self.num_experts, device=valid_TE.device).expand_as(valid_TE)
        return experts_TE, valid_TE if valid_T1 is None else valid_TE & valid_T1

    def _preference(
        self,
        logits_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        mask_T: torch.Tensor | None,
        bias_E: torch.Tensor | None,
        key: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the preferences [T, E]: the scores with the additions for the choice alone."""
        if self.options.force_balanced:
            return self._in_turn(scores_TE, mask_T)
        preference_TE = scores_TE
        if self.training and self.noise.on_choice is not None:
            preference_TE = self.score.of_logits(self.noise.on_choice(logits_TE, key))
        if bias_E is not None:
            preference_TE = preference_TE + bias_E
        if self.options.num_groups > 1:
            preference_TE = self._within_best_groups(preference_TE)
        return preference_TE

    def _within_best_groups(self, preference_TE: torch.Tensor) -> torch.Tensor:
        """Return the preferences with -inf for every expert outside of the token's best groups."""
        by_group_TGx = preference_TE.unflatten(1, (self.options.num_groups, -1))
        worth_TG = self.group_score(by_group_TGx)
        best = _largest(worth_TG, self.options.top_k_groups)
        outside_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best, False)
        # Not 0: beside a negative bias, an expert inside could have less.
        return by_group_TGx.masked_fill(outside_TG[..., None], -torch.inf).flatten(1)

    def _in_turn(self, scores_TE: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        """Return preferences that take the experts 0, 1, ..., E - 1, 0, ... in turn; masked tokens take none."""
        device = scores_TE.device
        # The number of a token among the unmasked ones: the turns have no gaps.
        turn_T = torch.arange(len(scores_TE), device=device) if mask_T is None else (mask_T.cumsum(0) - 1).clamp(min=0)
        expert_E = torch.arange(self.num_experts, device=device)
        # Token t prefers expert t * K mod E, then the next ones: the distance, counted upwards, is the dislike.
        return -((expert_E - turn_T[:, None] * self.k) % self.num_experts).float()


def _largest(x_Tn: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the columns of each row's `top_k` largest in falling order, the first of equals first: [T, K].

    The choice of `torch.topk` among equals depends on the device. `_sortable` keys have no equals, and are no slower.
    """
    return _sortable(x_Tn).topk(top_k, dim=-1).indices


# One row of n = 3, with the same number in columns 0 and 2:
#   x       1.0           -2.0           1.0
#   bits    0x3F800000    0xC0000000     0x3F800000
#   flipped 1065353216    -1073741825    1065353216
#   key     3196059648    -3221225476    3196059646    = flipped * 3 - column
def _sortable(x_Tn: torch.Tensor) -> torch.Tensor:
    """Return int64 keys in the order of the fp32 numbers, those of equals in falling order of their columns.

    The bits of positive floats, read as an integer, are in the order of the floats. Those of negative ones are in
    reverse order, so all but the sign are flipped. The column is a last digit, base n.
    """
    bits_Tn = (x_Tn + 0.0).view(torch.int32)  # -0 is 0
    # `>> 31` is all ones for negative numbers, whose 31 lower bits are flipped so. In int64, where * n has room.
    key_Tn = (bits_Tn ^ ((bits_Tn >> 31) & 0x7FFFFFFF)).long().mul_(x_Tn.shape[1])
    return key_Tn.sub_(torch.arange(x_Tn.shape[1], device=x_Tn.device))


class _Logits(torch.autograd.Function):
    """x @ W^T in fp32; keeps x in its own dtype for the backward pass, where autograd would keep an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        # As they are: cast again in the backward pass, so that an fp32 copy exists only while it is used.
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
        return grad_x_TD, (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
