"""Tensor-parallel layers: weights cut over the ranks of a tensor group.

A column-parallel linear has a slice of the outputs, a row-parallel one of the inputs; between them every rank works on
its own features, without communication (Megatron-LM, arXiv:1909.08053). Each layer holds its `Shard` of the weight that
one rank alone would have, and with a group of one rank is the plain layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import copy_weight_to_tensor_parallel_region, leave_tensor_parallel_region
from dsmoe.parallel.sharding import Shard


def mark_split(parameter: torch.Tensor) -> None:
    """Mark a parameter of which each tensor rank has another part: DeepSpeed adds up their gradient norms."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


class ColumnParallelLinear(nn.Linear):
    """x W^T for this rank's slice of W's rows, that is of the outputs; no bias.

    The input is the result of `mappings.enter_tensor_parallel_region`.

    Args:
        in_features: the width of the input.
        out_features: the width of the output over all ranks.
        group: the ranks.
        parts: matrices of equal height that stand one below the other in W.
    """

    def __init__(self, in_features: int, out_features: int, group: TensorGroup, parts: int = 1) -> None:
        super().__init__(in_features, _part(out_features, parts * group.size) * parts, bias=False)
        self.shard = Shard(0, group.rank, group.size, parts)
        if group.size > 1:
            mark_split(self.weight)


class RowParallelLinear(nn.Linear):
    """x W^T for this rank's slice of W's columns, that is of the inputs, summed over the ranks; no bias.

    The output is the result of `mappings.leave_tensor_parallel_region`.
    """

    def __init__(self, in_features: int, out_features: int, group: TensorGroup) -> None:
        super().__init__(_part(in_features, group.size), out_features, bias=False)
        self.group = group
        self.shard = Shard(1, group.rank, group.size)
        if group.size > 1:
            mark_split(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in / ranks] -> [..., out]."""
        return leave_tensor_parallel_region(F.linear(input, self.weight), self.group)


class SharedColumnParallelLinear(nn.Linear):
    """x W^T for one slice of W's rows where the slices are fewer than the ranks: neighbours compute the same slice.

    Every rank holds all of W, which is small (the few key/value heads of grouped-query attention), so that W is like
    any other replicated weight; the ranks' gradients are summed.

    Args:
        in_features: the width of the input.
        out_features: the width of the output over all slices.
        slices: the number of slices; divides the ranks of the group.
        group: the ranks.
    """

    def __init__(self, in_features: int, out_features: int, slices: int, group: TensorGroup) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.group = group
        # Two slices on four ranks: ranks 0 and 1 have slice 0, ranks 2 and 3 slice 1.
        height, index = _part(out_features, slices), group.rank * slices // group.size
        self.rows = slice(index * height, (index + 1) * height)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out / slices]."""
        # Outside of the slice a rank's gradient is 0, so that the sum over the ranks is the gradient of all of W.
        return F.linear(input, copy_weight_to_tensor_parallel_region(self.weight, self.group)[self.rows])


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which every rank holds the rows of its slice of the vocabulary."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group: TensorGroup) -> None:
        super().__init__(_part(num_embeddings, group.size), embedding_dim)
        self.group = group
        self.shard = Shard(0, group.rank, group.size)
        if group.size > 1:
            mark_split(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, D], or this rank's slice of S (see `mappings.leave_tensor_parallel_region`)."""
        if self.group.size == 1:
            return super().forward(input)
        # One rank has the row and the others add 0, so that the sum is exact in any dtype.
        local, is_local = local_ids(input, self.num_embeddings, self.group)
        return leave_tensor_parallel_region(torch.where(is_local[..., None], super().forward(local), 0.0), self.group)


def local_ids(ids: torch.Tensor, num_local: int, group: TensorGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each id's row in this rank's slice of the vocabulary, any row for an id of another slice, and its mask."""
    # Clamped and masked, not selected: the number of this rank's ids is on the device alone.
    local = ids - group.rank * num_local
    return local.clamp(0, num_local - 1), (local >= 0) & (local < num_local)


def _part(width: int, count: int) -> int:
    assert width % count == 0, f"{width} cannot be cut into {count}; checked when the config is loaded"
    return width // count
