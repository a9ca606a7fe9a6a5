"""From logits to scores, choices and weights in one pass, and from their gradients back in another.

Twin: `dsmoe.moe.router.Router`. The scores are an output of their own, with a gradient, because the load-balancing
loss and the statistics need all of them; the z-loss takes the logits, which come from outside. Where choices differ
from the scores by more than a bias (groups, noise), the caller passes a finished preference.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsmoe.kernels import Entry, kernel_code
from dsmoe.kernels.blocks import SIZES


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    preference_TE: torch.Tensor | None,
    top_k: int,
    score: Entry,
    normalize: bool,
    scale: float,
    tiny: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, choose the top k, weigh.

    Of equal preferences the lower expert goes first; NaN goes before everything, as in `torch.topk`. Each expert is
    chosen at most once by a token, whatever the numbers.

    Args:
        logits_TE: fp32.
        bias_E: fp32, added to the scores to choose by; None adds nothing.
        preference_TE: fp32, the choice's numbers instead of scores plus bias.
        top_k: K.
        score: an entry of `dsmoe.moe.scores.SCORES`.
        normalize: divide the chosen scores by their sum plus `tiny`.
        scale: factor of the weights after that.
        tiny: see `normalize`.

    Returns:
        Scores [T, E] and weights [T, K], fp32 with a gradient, and the experts [T, K], int64, in order of falling
        preference.

    Raises:
        NotImplementedError: the kernel has no code for the score.
    """
    code = kernel_code(score, "dsmoe.moe.scores.SCORES", __name__)
    return _Route.apply(logits_TE, bias_E, preference_TE, top_k, code, normalize, scale, tiny)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        preference_TE: torch.Tensor | None,
        top_k: int,
        *rule: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = logits_TE.shape
        scores_TE = torch.empty_like(logits_TE)
        weights_TK = logits_TE.new_empty(num_tokens, top_k)
        experts_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
        tensors = (logits_TE, bias_E, preference_TE, scores_TE, weights_TK, experts_TK)
        _launch(_forward, tensors, num_tokens, num_experts, top_k, rule)
        # No logits and no weights: the slope of either score follows from the score itself.
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.rule = rule
        ctx.mark_non_differentiable(experts_TK)
        # None for an output that nothing used, instead of zeros: the kernel is compiled without reading it.
        ctx.set_materialize_grads(False)
        return scores_TE, weights_TK, experts_TK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scores_TE: torch.Tensor | None, grad_weights_TK: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        scores_TE, experts_TK = ctx.saved_tensors
        num_tokens, num_experts = scores_TE.shape
        grad_logits_TE = torch.empty_like(scores_TE)
        if grad_scores_TE is not None:
            grad_scores_TE = grad_scores_TE.contiguous()
        if grad_weights_TK is not None:
            grad_weights_TK = grad_weights_TK.contiguous()
        tensors = (scores_TE, experts_TK, grad_scores_TE, grad_weights_TK, grad_logits_TE)
        _launch(_backward, tensors, num_tokens, num_experts, experts_TK.shape[1], ctx.rule)
        return grad_logits_TE, None, None, None, None, None, None, None


def _launch(
    kernel: Any,
    tensors: tuple[torch.Tensor | None, ...],
    num_tokens: int,
    num_experts: int,
    top_k: int,
    rule: tuple[str, bool, float, float],
) -> None:
    # Triton works on powers of two: the rest of the columns and choices is masked.
    columns, choices = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    rows = max(SIZES["topk_router"]["tile"] // columns, 1)
    sizes = (num_experts, top_k, rows, columns, choices)
    kernel[(triton.cdiv(num_tokens, rows),)](
        *tensors, num_tokens, *rule, *sizes, num_warps=SIZES["topk_router"]["warps"]
    )


@triton.jit
def _ordered(x):
    """Return int32 keys in the order of the floats: -0 equals 0, NaN is above all, and INT_MIN below all.

    Negative floats have their bits but the sign flipped, as in `dsmoe.moe.router._sortable`: 1.0 is 0x3F800000, and
    -2.0, 0xC0000000, becomes 0xBFFFFFFF = -1073741825. Keys rather than floats, since comparisons with NaN are false
    and the maximum of a row with NaN would match no column.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


# A program has ROWS tokens, each a row of COLUMNS experts, at 64-bit places, since T * E may exceed 2^31. It goes over
# its rows K times and does not sort them: K is small. Of all sizes only the number of tokens changes from pass to
# pass; specialised, it would compile the kernel again. One token, E = 4, K = 2, scores .3 .5 .5 .1, normalised:
#   k = 0      best .5, of experts 1 and 2 the first: 1, whose key becomes the least of all
#   k = 1      best .5, expert 2
#   weights    .5 / (.5 + .5) each, of experts 1 and 2
@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    logits,
    bias,
    preferences,
    scores,
    weights,
    experts,
    num_tokens,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    TINY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    expert = tl.arange(0, COLUMNS)[None, :]
    exists = expert < NUM_EXPERTS
    place, mask = token * NUM_EXPERTS + expert, (token < num_tokens) & exists
    logit = tl.load(logits + place, mask=mask, other=0.0)
    if SCORE == "softmax":
        # Columns that are no expert have power 0, and change neither maximum nor sum.
        logit = tl.where(exists, logit, float("-inf"))
        power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        score = power / tl.sum(power, axis=1)[:, None]
    elif SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        tl.static_assert(False, f"this kernel has no branch for the score {SCORE}")
    tl.store(scores + place, score, mask=mask)
    # The bias moves the choice alone: the weights below are made of `score`.
    preference = score
    if preferences is not None:
        preference = tl.load(preferences + place, mask=mask, other=0.0)
    elif bias is not None:
        preference += tl.load(bias + expert, mask=exists, other=0.0)

    key = tl.where(exists, _ordered(preference), -0x80000000)
    choice = tl.arange(0, CHOICES)[None, :]
    chosen_expert = tl.zeros([ROWS, CHOICES], tl.int32)
    chosen_score = tl.zeros([ROWS, CHOICES], tl.float32)
    for k in range(TOP_K):
        # The largest key, the first of equals; INT_MIN afterwards, so that no expert is chosen twice.
        best = tl.max(key, axis=1)[:, None]
        first = tl.min(tl.where(key == best, expert, COLUMNS), axis=1)[:, None]
        key = tl.where(expert == first, -0x80000000, key)
        # One term that is not 0: exact.
        its_score = tl.sum(tl.where(expert == first, score, 0.0), axis=1)[:, None]
        chosen_expert = tl.where(choice == k, first, chosen_expert)
        chosen_score = tl.where(choice == k, its_score, chosen_score)

    if NORMALIZE:
        # Choices from K to CHOICES have score 0.
        chosen_score /= tl.sum(chosen_score, axis=1)[:, None] + TINY
    place, mask = token * TOP_K + choice, (token < num_tokens) & (choice < TOP_K)
    tl.store(weights + place, chosen_score * SCALE, mask=mask)
    tl.store(experts + place, chosen_expert.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward(
    scores,
    experts,
    grad_scores,
    grad_weights,
    grad_logits,
    num_tokens,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    TINY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    # In one row, for the chosen j with weights w_j = SCALE * s_j / t, t = TINY + the sum of the chosen s:
    #   dL/ds_j = SCALE * (g_j - m) / t      with m = (the sum of g_k s_k over the chosen k) / t
    # The gradient of the scores as an output is added to that, and the sum goes back through the score.
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    expert = tl.arange(0, COLUMNS)[None, :]
    place, mask = token * NUM_EXPERTS + expert, (token < num_tokens) & (expert < NUM_EXPERTS)
    score = tl.load(scores + place, mask=mask, other=0.0)
    grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_weights is not None:
        # Apart from `grad`, since a chosen expert's g may be 0 where m is not.
        chosen = tl.zeros([ROWS, COLUMNS], tl.int1)
        for k in range(TOP_K):
            # -1 for a row behind the last token: no expert's number.
            its_expert = tl.load(experts + token * TOP_K + k, mask=token < num_tokens, other=-1).to(tl.int32)
            its_grad = tl.load(grad_weights + token * TOP_K + k, mask=token < num_tokens, other=0.0)
            # An expert is chosen once at most by a token: nothing to add, and no atomics.
            grad = tl.where(expert == its_expert, its_grad, grad)
            chosen = chosen | (expert == its_expert)
        if NORMALIZE:
            total = tl.sum(tl.where(chosen, score, 0.0), axis=1)[:, None] + TINY
            mean = tl.sum(grad * score, axis=1)[:, None] / total
            grad = tl.where(chosen, (grad - mean) / total, 0.0)
        grad *= SCALE
    if grad_scores is not None:
        grad += tl.load(grad_scores + place, mask=mask, other=0.0)
    if SCORE == "softmax":
        # Columns that are no expert have score 0, and so no part in the sum.
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    elif SCORE == "sigmoid":
        grad *= score * (1.0 - score)
    else:
        tl.static_assert(False, f"this kernel has no branch for the score {SCORE}")
    tl.store(grad_logits + place, grad, mask=mask)
