"""Cross entropy over a large vocabulary without the logits ever standing whole in memory.

Shape suffixes: N tokens, D model, V vocabulary, C the tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 2**25
"""Most logits alive at a time: 128 MiB in fp32, and as much again while a chunk's loss or gradient is formed."""


def token_losses(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each of N tokens in nats, [N] fp32 (fp64 for fp64 weights).

    Chunks of tokens are projected onto the vocabulary one after the other, and again in the backward pass. There the
    head's gradient is summed over the chunks in fp32 and rounded once, so that it is no worse for many chunks than for
    one; while the sum is formed it takes 4 V D bytes, and a chunk's share of it as much as the head itself.
    `torch.nn.functional.linear_cross_entropy` also works in chunks, but returns a bf16 loss for bf16 weights.

    Args:
        hidden_ND: the last hidden states, of the head's dtype.
        head_VD: the output head.
        targets_N: int64, each in [0, V).
    """
    losses_N: torch.Tensor = _TokenLosses.apply(hidden_ND, head_VD, targets_N)
    return losses_N


class _TokenLosses(torch.autograd.Function):
    """Keeps its inputs only; the gradient of the logits is (softmax - one-hot) times that of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, targets_N)
        losses_N = torch.empty(len(targets_N), dtype=_wide(head_VD.dtype), device=head_VD.device)
        for rows in _chunks(hidden_ND, head_VD):
            logits_CV = F.linear(hidden_ND[rows], head_VD).to(losses_N.dtype)
            losses_N[rows] = F.cross_entropy(logits_CV, targets_N[rows], reduction="none")
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_ND, head_VD, targets_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=_wide(head_VD.dtype))
        for rows in _chunks(hidden_ND, head_VD):
            grad_CV = _logits_gradient(hidden_ND[rows], head_VD, targets_N[rows], grad_N[rows])
            grad_hidden_ND[rows] = grad_CV @ head_VD
            grad_head_VD += grad_CV.T @ hidden_ND[rows]
        return grad_hidden_ND, grad_head_VD.to(head_VD.dtype), None


def _logits_gradient(
    hidden_CD: torch.Tensor, head_VD: torch.Tensor, targets_C: torch.Tensor, grad_C: torch.Tensor
) -> torch.Tensor:
    """[C, V] in the head's dtype: formed in fp32, rounded only to be multiplied."""
    grad_CV = F.linear(hidden_CD, head_VD).softmax(dim=-1, dtype=grad_C.dtype)
    grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    return grad_CV.mul_(grad_C[:, None]).to(head_VD.dtype)


def _chunks(hidden_ND: torch.Tensor, head_VD: torch.Tensor) -> Iterator[slice]:
    """Rows of `hidden_ND` whose logits together are at most LOGITS_PER_CHUNK, or one row."""
    size = max(1, LOGITS_PER_CHUNK // len(head_VD))
    return (slice(start, start + size) for start in range(0, len(hidden_ND), size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums: fp32, or fp64 to check gradients."""
    return torch.promote_types(dtype, torch.float32)
