"""Cross entropy over a large vocabulary in chunks of tokens, so that all logits are never in memory at once.

Shape suffixes: see `dsmoe.moe`; N tokens, J those of one chunk, O those of one block of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsmoe.nn.linear import local_ids
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import all_gather

LOGITS_PER_CHUNK = 2**25
"""Most logits alive at a time: 64 MiB in bf16. On a GPU 128 MiB of them in fp32 come to it, and as much again while a
chunk's loss is formed."""

LOGITS_PER_BLOCK_ON_CPU = 2**18
"""Most logits in fp32 at a time on a CPU: 1 MiB stays in the cache, and large buffers would be new pages from the
system each time."""


def token_losses(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, group: TensorGroup | None = None
) -> torch.Tensor:
    """Return the cross entropy of each of N tokens in nats, [N] fp32 (fp64 for fp64 weights).

    Chunks of tokens are projected onto the vocabulary one after the other, and again in the backward pass, but for the
    last chunk, whose logits are kept: the backward pass begins with them. There the head's gradient is summed over the
    chunks in fp32 and rounded once, so that many chunks are as exact as one; the sum takes 4 V D bytes while it is
    formed, and a chunk's share of it as much as the head itself.
    `torch.nn.functional.linear_cross_entropy` also works in chunks, but returns a bf16 loss for bf16 weights.

    Over a tensor group every rank projects onto its slice of the vocabulary; two numbers per token and rank are
    exchanged, never logits.

    Args:
        hidden_ND: the last hidden states, of the head's dtype; over a tensor group, the result of
            `mappings.enter_tensor_parallel_region`.
        head_VD: the output head, or this rank's slice of it.
        targets_N: int64, each in [0, whole vocabulary).
        group: the ranks that share the head; None is this one alone.
    """
    losses_N: torch.Tensor = _TokenLosses.apply(hidden_ND, head_VD, targets_N, group or TensorGroup.alone())
    return losses_N


class _TokenLosses(torch.autograd.Function):
    """Keeps its inputs and each logsumexp; the gradient of the logits is (softmax - one-hot) times that of the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, group: TensorGroup
    ) -> torch.Tensor:
        local_N, is_local_N = local_ids(targets_N, len(head_VD), group)
        # This rank's logsumexp of each token, and the logit of its target; 0 for a target in another rank's slice.
        parts_N2 = torch.empty(len(targets_N), 2, dtype=_wide(head_VD.dtype), device=head_VD.device)
        logits_JV = None
        for chunk in _chunks(hidden_ND, head_VD):
            logits_JV = F.linear(hidden_ND[chunk], head_VD)
            for rows, block_OV in _blocks(chunk, logits_JV):
                wide_OV = block_OV.to(parts_N2.dtype)
                parts_N2[rows, 0] = wide_OV.logsumexp(dim=-1)
                # One rank has the target, the others add 0.
                parts_N2[rows, 1] = wide_OV.gather(1, local_N[rows, None])[:, 0].where(is_local_N[rows], 0.0)
        lse_N, target_N = parts_N2.unbind(1)
        if group.size > 1:
            # Not the exponentials: a logsumexp of logsumexps does not overflow.
            parts_RN2 = all_gather(parts_N2, group).unflatten(0, (group.size, -1))
            lse_N, target_N = parts_RN2[..., 0].logsumexp(dim=0), parts_RN2[..., 1].sum(dim=0)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, lse_N)
        ctx.group, ctx.last_logits_JV = group, logits_JV
        return lse_N - target_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_ND, head_VD, targets_N, lse_N = ctx.saved_tensors
        local_N, is_local_N = local_ids(targets_N, len(head_VD), ctx.group)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # In fp32 at least, or every chunk would round the sum.
        grad_head_VD = torch.zeros_like(head_VD, dtype=lse_N.dtype)
        # Overwritten below: a second backward pass (`retain_graph`) makes them anew.
        logits_JV, ctx.last_logits_JV = ctx.last_logits_JV, None
        # The last chunk first: its logits are there, and need not be computed again.
        for chunk in reversed(_chunks(hidden_ND, head_VD)):
            if logits_JV is None:
                logits_JV = F.linear(hidden_ND[chunk], head_VD)
            for rows, block_OV in _blocks(chunk, logits_JV):
                # Formed in fp32, rounded only to be multiplied.
                grad_OV = block_OV.to(lse_N.dtype).sub_(lse_N[rows, None]).exp_()
                grad_OV.scatter_add_(1, local_N[rows, None], -is_local_N[rows, None].to(grad_OV.dtype))
                block_OV.copy_(grad_OV.mul_(grad_N[rows, None]))
            # The chunk's logits have been overwritten with their gradient.
            grad_hidden_ND[chunk] = logits_JV @ head_VD
            grad_head_VD += logits_JV.T @ hidden_ND[chunk]
            logits_JV = None
        return grad_hidden_ND, grad_head_VD.to(head_VD.dtype), None, None


def _chunks(hidden_ND: torch.Tensor, head_VD: torch.Tensor) -> list[slice]:
    """Cut `hidden_ND` into rows with at most LOGITS_PER_CHUNK logits together, or one row."""
    size = max(1, LOGITS_PER_CHUNK // len(head_VD))
    return [slice(start, start + size) for start in range(0, len(hidden_ND), size)]


def _blocks(chunk: slice, logits_JV: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut a chunk's logits into blocks for fp32: the block's rows among all tokens, and a view of its logits."""
    size = len(logits_JV)
    if logits_JV.device.type == "cpu":
        size = max(1, LOGITS_PER_BLOCK_ON_CPU // logits_JV.shape[1])
    for start, block_OV in zip(range(chunk.start, chunk.stop, size), logits_JV.split(size), strict=False):
        yield slice(start, start + len(block_OV)), block_OV


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and sums: fp32, or fp64 to check gradients."""
    return torch.promote_types(dtype, torch.float32)
