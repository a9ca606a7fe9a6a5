"""RMSNorm between the blocks, where each rank of a tensor group may have other tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import copy_weight_to_tensor_parallel_region


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with the same weight on all ranks of `group`, each of which norms other vectors."""

    def __init__(self, size: int, eps: float, group: TensorGroup) -> None:
        super().__init__(size, eps=eps)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        assert self.weight is not None
        return F.rms_norm(
            x, self.normalized_shape, copy_weight_to_tensor_parallel_region(self.weight, self.group), self.eps
        )
