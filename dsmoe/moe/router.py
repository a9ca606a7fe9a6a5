"""Step 1, route: which experts each token goes to, and with what weight.

Shape suffixes of `dsmoe.moe`: T tokens of this rank, D hidden, E experts, K choices per token, A = T * K assignments
(token-major), N rows, L experts of this rank, R ranks of the expert group, C capacity, I inner width of an expert,
G groups of experts, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dsmoe.moe.kernels import on_gpu
from dsmoe.moe.scores import GROUP_SCORES, NOISES, SCORES, TINY
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.regions import sum_gradients

CHOICES = ("token", "expert")


@dataclass(frozen=True)
class RoutingRule:
    """How scores become choices and weights; the same for every k.

    Attributes:
        top_k: K, experts per token; the mean over the tokens where experts choose.
        choice: every `token` chooses its K experts, or every `expert` its C tokens (Zhou et al. 2022, arXiv
            2202.09368): even loads by construction, but a token's experts then depend on the tokens after it.
        score: `softmax` over the experts (Shazeer et al. 2017), or `sigmoid` of each logit (DeepSeek-V3, eq. 15).
        normalize_weights: divide the K chosen scores by their sum (Mixtral, Qwen3; DeepSeek-V3, eq. 13).
        scale: what the weights are then multiplied by (DeepSeek-V3 uses 2.5).
        num_groups: G. Experts stand in G groups of E / G neighbours (DeepSeek-V3, sec. 2.1.2: one group per node).
        top_k_groups: only experts of a token's best so many groups can be chosen.
        group_score: what a group is worth: its best expert's score (`max`, DeepSeek-V2) or the sum of its best two
            (`top2_sum`, DeepSeek-V3).
        noise: in training only: `jitter` multiplies the router's input by uniform noise (Switch Transformer),
            `gumbel` adds Gumbel noise to the logits that choose, so that experts are drawn without replacement in
            proportion to their softmax scores (Kool et al. 2019); the weights are those without the noise.
        force_balanced: for benchmarks: tokens take the experts in turn, whatever the scores; weights as routed.
    """

    top_k: int
    choice: str = "token"
    score: str = "softmax"
    normalize_weights: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "top2_sum"
    noise: str = "none"
    force_balanced: bool = False

    def check(self, num_experts: int) -> None:
        """Raise ValueError where the rule cannot choose among `num_experts`."""
        options = (("choice", CHOICES), ("score", SCORES), ("group_score", GROUP_SCORES), ("noise", NOISES))
        for name, valid in options:
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {tuple(valid)}, not {getattr(self, name)!r}")
        if self.choice == "expert":
            for name, idle in (("normalize_weights", False), ("num_groups", 1), ("force_balanced", False)):
                if getattr(self, name) != idle:
                    raise ValueError(f"{name} has no meaning where choice is 'expert'; leave it at {idle}")
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"k ({self.top_k}) must be between 1 and num_experts ({num_experts})")
        if not self.scale > 0:
            raise ValueError(f"weight_scale must be > 0, not {self.scale}")
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"num_groups ({self.num_groups}) must divide num_experts ({num_experts})")
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise ValueError(f"top_k_groups ({self.top_k_groups}) must be between 1 and num_groups ({self.num_groups})")
        size = num_experts // self.num_groups
        if self.top_k > self.top_k_groups * size:
            raise ValueError(f"k ({self.top_k}) must fit into {self.top_k_groups} groups of {size} experts")
        if self.num_groups > 1 and self.group_score == "top2_sum" and size < 2:
            raise ValueError("group_score 'top2_sum' needs groups of at least 2 experts; use 'max'")


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens.

    `weights_TK` (fp32, differentiable) and `experts_TK` (int64) are in order of falling preference, that is of the
    score with what the selection adds to it (bias, Gumbel noise). Tokens that are masked out have expert E, which does
    not exist, and weight 0. Where experts choose, K is E: column e is expert e's, and has expert E and weight 0 for
    the tokens that e did not choose. `logits_TE` and `scores_TE` (fp32) are without bias and Gumbel noise; jitter is in
    them, as it is in the router's input. `probabilities_TE` are the scores over their sum (softmax scores themselves).
    """

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    probabilities_TE: torch.Tensor
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    mask_T: torch.Tensor | None


class Router(nn.Module):
    """A linear map to one logit per expert, and a `RoutingRule`; all of it in fp32 whatever the model's dtype.

    Args:
        hidden_size: D.
        num_experts: E.
        rule: how logits become choices and weights.

    Attributes:
        tensor_group: the ranks that have the same weight and each route other tokens of one micro-batch.
    """

    def __init__(self, hidden_size: int, num_experts: int, rule: RoutingRule) -> None:
        super().__init__()
        rule.check(num_experts)
        self.num_experts = num_experts
        self.rule = rule
        self.score = SCORES[rule.score]
        self.group_score = GROUP_SCORES[rule.group_score]
        self.noise = NOISES[rule.noise]
        self.tensor_group = TensorGroup.alone()
        # On meta, so that torch draws no weight only to have it replaced.
        self.wg = nn.Linear(hidden_size, num_experts, bias=False, device="meta")
        self.wg.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def weight(self) -> nn.Parameter:
        """[E, D]; `wg.weight`, as in DeepSpeed's gate."""
        return cast("nn.Parameter", self.wg.weight)

    @property
    def k(self) -> int:
        """K, as in DeepSpeed's gate."""
        return self.rule.top_k

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
            mask_T: bool; where it is False the token goes nowhere.
            bias_E: added to the scores that choose, not to those that weigh (see `dsmoe.moe.balance.Balance`).
            key: what noise is drawn from (see `dsmoe.moe.draws`); None is torch's generator.
            capacity: C, how many tokens an expert chooses where experts choose.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and self.noise.on_input is not None:
                x_TD = self.noise.on_input(x_TD, key)
            logits_TE = _Logits.apply(x_TD, sum_gradients(self.weight, self.tensor_group))
        decide = self._decide_fused if on_gpu(logits_TE) and self.rule.choice == "token" else self._decide
        scores_TE, weights_TK, experts_TK, valid_TK = decide(logits_TE, mask_T, bias_E, key, capacity)
        probabilities_TE = self.score.over_experts(scores_TE)
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
        """Scores [T, E]; weights and experts [T, K], and which of them count, [T, K] or [T, 1]; None: all."""
        scores_TE = self.score.of_logits(logits_TE)
        with torch.no_grad():
            experts_TK, valid_TK = self._choose(logits_TE, scores_TE, mask_T, bias_E, key, capacity)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.rule.normalize_weights:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        if self.rule.scale != 1.0:
            weights_TK = weights_TK * self.rule.scale
        return scores_TE, weights_TK, experts_TK, valid_TK

    def _decide_fused(
        self,
        logits_TE: torch.Tensor,
        mask_T: torch.Tensor | None,
        bias_E: torch.Tensor | None,
        key: torch.Tensor | None,
        _: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`_decide` where tokens choose, as one kernel unless the choice goes by more than scores and bias."""
        from dsmoe.moe.kernels.topk_router import route

        rule, preference_TE = self.rule, None
        if rule.force_balanced or rule.num_groups > 1 or (self.training and self.noise.on_choice is not None):
            with torch.no_grad():
                preference_TE = self._preference(logits_TE, self.score.of_logits(logits_TE), mask_T, bias_E, key)
        scores_TE, weights_TK, experts_TK = route(
            logits_TE, bias_E, preference_TE, rule.top_k, self.score, rule.normalize_weights, rule.scale, TINY
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
        """Experts [T, K], and which of them count, [T, K] or [T, 1]; None: all."""
        valid_T1 = None if mask_T is None else mask_T[:, None]
        preference_TE = self._preference(logits_TE, scores_TE, mask_T, bias_E, key)
        if self.rule.choice == "token":
            return _largest(preference_TE, self.rule.top_k), valid_T1
        assert capacity is not None, "experts choose as many tokens as they have room for"
        if valid_T1 is not None:
            preference_TE = preference_TE.masked_fill(~valid_T1, -torch.inf)
        # A sort, since what `topk` makes of equal scores depends on the device.
        best_CE = preference_TE.argsort(dim=0, descending=True, stable=True)[:capacity]
        valid_TE = torch.zeros_like(preference_TE, dtype=torch.bool).scatter_(0, best_CE, True)
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
        """What the choice goes by, [T, E]: the scores, with all that is added to them for the choice alone."""
        if self.rule.force_balanced:
            return self._in_turn(scores_TE, mask_T)
        preference_TE = scores_TE
        if self.training and self.noise.on_choice is not None:
            preference_TE = self.score.of_logits(self.noise.on_choice(logits_TE, key))
        if bias_E is not None:
            preference_TE = preference_TE + bias_E
        if self.rule.num_groups > 1:
            preference_TE = self._within_best_groups(preference_TE)
        return preference_TE

    def _within_best_groups(self, preference_TE: torch.Tensor) -> torch.Tensor:
        """The preferences, with -inf for every expert outside of the token's best groups."""
        rule = self.rule
        by_group_TGx = preference_TE.unflatten(1, (rule.num_groups, -1))
        worth_TG = self.group_score(by_group_TGx)
        best = _largest(worth_TG, rule.top_k_groups)
        outside_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best, False)
        return by_group_TGx.masked_fill(outside_TG[..., None], -torch.inf).flatten(1)

    def _in_turn(self, scores_TE: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        """Preferences that take the experts 0, 1, ..., E - 1, 0, ... in turn; masked tokens do not take one."""
        device = scores_TE.device
        turn_T = torch.arange(len(scores_TE), device=device) if mask_T is None else (mask_T.cumsum(0) - 1).clamp(min=0)
        expert_E = torch.arange(self.num_experts, device=device)
        return -((expert_E - turn_T[:, None] * self.rule.top_k) % self.num_experts).float()


def _largest(x_Tn: torch.Tensor, top_k: int) -> torch.Tensor:
    """Where the `top_k` largest of each row stand, in falling order, the first of equals first: [T, K].

    Which of equals `torch.topk` takes depends on the device. So that there are none, it gets as integers the bits of
    the fp32 numbers, put in the order of the numbers, with the columns as their last digit. It is no slower.
    """
    bits_Tn = (x_Tn + 0.0).view(torch.int32)  # -0 is 0
    key_Tn = (bits_Tn ^ ((bits_Tn >> 31) & 0x7FFFFFFF)).long().mul_(x_Tn.shape[1])
    return key_Tn.sub_(torch.arange(x_Tn.shape[1], device=x_Tn.device)).topk(top_k, dim=-1).indices


class _Logits(torch.autograd.Function):
    """x @ W^T in fp32, which keeps x as it came and not a copy of it in fp32 as autograd would."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
        return grad_x_TD, (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
