"""Crossings between the parts of a model that the ranks of a tensor group share in different ways.

Between the blocks every rank holds all tokens (replicated), or, under sequence parallelism, its slice of the sequence.
Within attention, a dense feed-forward or the output head every rank holds all tokens and a slice of the weights, so
that what it computes is one term of a sum. In an MoE layer every rank holds its slice of the tokens. Each crossing is a
collective whose gradient is the collective of the way back (Megatron-LM, arXiv:1909.08053 and 2205.05198).

All work on [..., S, D] and cut S, the last dimension but one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dsmoe.parallel.groups import TensorGroup

Move = Callable[[torch.Tensor, TensorGroup], torch.Tensor]

# torch 2.13 has given them new names and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def enter_split(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From between the blocks to where the weights are split: all tokens; the ranks' gradients are summed."""
    return _cross(x, group, gather, reduce_scatter) if group.sequence else _cross(x, group, _same, reduce)


def leave_split(terms: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The way back: the sum of the ranks' terms, in all (replicated) or for this rank's slice of the sequence."""
    return _cross(terms, group, reduce_scatter, gather) if group.sequence else _cross(terms, group, reduce, _same)


def enter_tokens(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From between the blocks to where every rank works on its own slice of the tokens."""
    return x if group.sequence else _cross(x, group, own_slice, gather)


def leave_tokens(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The way back."""
    return x if group.sequence else _cross(x, group, gather, own_slice)


def leave_columns(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, V / ranks], each rank's own features of all tokens -> [..., S, V] on every rank."""
    if group.size == 1:
        return x
    return leave_tokens(x.transpose(-2, -1), replace(group, sequence=False)).transpose(-2, -1)


def sum_over_ranks(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum of the ranks' `x`, of which each rank's gradient reaches its own term."""
    return _cross(x, group, reduce, _same)


def sum_gradients(weight: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """A weight that is the same on all ranks, of which each uses only a part or on its own tokens.

    What the ranks add to its gradient is summed, in fp32 at least.
    """
    return _cross(weight, group, _same, _reduce_wide)


def reduce(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum of every rank's `x`; without a gradient, as all below."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group.handle)
    return total


def gather(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S / ranks, D] of every rank -> [..., S, D]."""
    slices = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _all_gather(slices, x.contiguous(), group=group.handle)
    return slices.unflatten(0, (group.size, -1)).movedim(0, -3).flatten(-3, -2)


def reduce_scatter(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] -> this rank's [..., S / ranks, D] of the sum."""
    slices = x.unflatten(-2, (group.size, -1)).movedim(-3, 0).contiguous()
    total = torch.empty_like(slices[0])
    _reduce_scatter(total, slices.flatten(0, 1), group=group.handle)
    return total


def own_slice(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] -> this rank's [..., S / ranks, D]."""
    return x.chunk(group.size, dim=-2)[group.rank].contiguous()


def _same(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    return x.view_as(x)


def _reduce_wide(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    return reduce(x.to(torch.promote_types(x.dtype, torch.float32)), group).to(x.dtype)


def _cross(x: torch.Tensor, group: TensorGroup, there: Move, back: Move) -> torch.Tensor:
    return x if group.size == 1 else _Crossing.apply(x, group, there, back)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup, there: Move, back: Move) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None
