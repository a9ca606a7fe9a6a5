"""Mappings: the crossings between the regions of a model that the ranks of a tensor group share in different ways.

Between the blocks every rank holds all tokens (replicated), or, under sequence parallelism, its slice of the sequence.
In a tensor-parallel region (attention, a dense feed-forward, the output head) every rank holds all tokens and a slice
of the weights, so that its output is one term of a sum. In a sequence-parallel region (an MoE layer, and the stretch
between the blocks under sequence parallelism) every rank holds its slice of the tokens.

A crossing is a collective whose gradient is the transposed collective. The names are Megatron's (Megatron-LM,
arXiv:1909.08053 and 2205.05198; `core/tensor_parallel/mappings.py`). `enter_` and `leave_` choose the crossing by
`group.sequence`, that is by what the ranks hold between the blocks. A group of one rank crosses nothing.

All but `gather_from_tensor_parallel_region` take [..., S, D] and cut S, the last dimension but one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dsmoe.parallel.groups import TensorGroup

Collective = Callable[[torch.Tensor, TensorGroup], torch.Tensor]

# torch 2.13 has given them new names and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def enter_tensor_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From between the blocks to where the weights are cut: all tokens; the ranks' gradients are summed."""
    if group.sequence:
        return gather_from_sequence_parallel_region(x, group, tensor_parallel_output_grad=True)
    return copy_to_tensor_parallel_region(x, group)


def leave_tensor_parallel_region(terms: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The return route: the sum of the ranks' terms, whole (replicated) or for this rank's slice of the sequence."""
    if group.sequence:
        return reduce_scatter_to_sequence_parallel_region(terms, group)
    return reduce_from_tensor_parallel_region(terms, group)


def enter_sequence_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From between the blocks to where every rank works on its own slice of the tokens, as an MoE layer does."""
    return x if group.sequence else scatter_to_sequence_parallel_region(x, group)


def leave_sequence_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The return route of `enter_sequence_parallel_region`."""
    return x if group.sequence else gather_from_sequence_parallel_region(x, group, tensor_parallel_output_grad=False)


def copy_to_tensor_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Return x; the gradient is the sum of the ranks' gradients."""
    return _cross(x, group, _same, all_reduce)


def copy_weight_to_tensor_parallel_region(weight: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Return a weight that all ranks hold and each uses in part, or on its own tokens.

    Its gradient is the sum of the ranks' gradients, in fp32 at least. Megatron sums these after the backward pass.
    """
    return _cross(weight, group, _same, _all_reduce_wide)


def reduce_from_tensor_parallel_region(terms: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Return the sum of the ranks' terms; the gradient reaches each rank's own term as it is."""
    return _cross(terms, group, all_reduce, _same)


def gather_from_tensor_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, V / ranks], each rank's own features of all tokens -> [..., S, V] on every rank."""
    if group.size == 1:
        return x
    # The collectives cut the last dimension but one, and features are the last.
    return _cross(x.transpose(-2, -1), group, all_gather, own_slice).transpose(-2, -1)


def scatter_to_sequence_parallel_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] -> this rank's slice [..., S / ranks, D]; the gradients are gathered."""
    return _cross(x, group, own_slice, all_gather)


def gather_from_sequence_parallel_region(
    x: torch.Tensor, group: TensorGroup, tensor_parallel_output_grad: bool
) -> torch.Tensor:
    """[..., S / ranks, D] of every rank -> [..., S, D].

    Args:
        x: this rank's slice.
        group: the ranks.
        tensor_parallel_output_grad: each rank has one term of the output's gradient, as in a tensor-parallel region:
            the terms are summed. False: every rank has the whole gradient and keeps its slice.
    """
    return _cross(x, group, all_gather, reduce_scatter if tensor_parallel_output_grad else own_slice)


def reduce_scatter_to_sequence_parallel_region(terms: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] terms -> this rank's slice [..., S / ranks, D] of their sum; the gradients are gathered."""
    return _cross(terms, group, reduce_scatter, all_gather)


def all_reduce(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Return the sum of every rank's `x`; without a gradient, as all below."""
    # A copy, since torch reduces in place, and others may hold `x`.
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group.handle)
    return total


def all_gather(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S / ranks, D] of every rank -> [..., S, D]."""
    # Two ranks, x of [B, S / 2, D]. torch puts whole ranks one behind the other, [2 B, S / 2, D], but the slices of one
    # batch entry belong together: [2, B, S / 2, D] -> [B, 2, S / 2, D] -> [B, S, D].
    slices = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _all_gather(slices, x.contiguous(), group=group.handle)
    return slices.unflatten(0, (group.size, -1)).movedim(0, -3).flatten(-3, -2)


def reduce_scatter(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] -> this rank's [..., S / ranks, D] of the sum."""
    # The reverse: what goes to one rank has to be one run of memory, so ranks become the first dimension.
    slices = x.unflatten(-2, (group.size, -1)).movedim(-3, 0).contiguous()
    total = torch.empty_like(slices[0])
    _reduce_scatter(total, slices.flatten(0, 1), group=group.handle)
    return total


def own_slice(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """[..., S, D] -> this rank's [..., S / ranks, D]."""
    return x.chunk(group.size, dim=-2)[group.rank].contiguous()


def _same(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    return x.view_as(x)


def _all_reduce_wide(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    return all_reduce(x.to(torch.promote_types(x.dtype, torch.float32)), group).to(x.dtype)


def _cross(x: torch.Tensor, group: TensorGroup, collective: Collective, transposed: Collective) -> torch.Tensor:
    return x if group.size == 1 else _Crossing.apply(x, group, collective, transposed)


# Crossings are linear: no tensor is kept for the backward pass.
class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: TensorGroup, collective: Collective, transposed: Collective
    ) -> torch.Tensor:
        ctx.group, ctx.transposed = group, transposed
        return collective(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.transposed(grad, ctx.group), None, None, None
