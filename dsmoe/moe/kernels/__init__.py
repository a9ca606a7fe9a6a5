"""Triton kernels for the memory-bound steps around the experts' matrix products, one file each.

Every kernel has a twin in plain PyTorch, next to its caller, which defines what it computes and runs on a CPU. Kernels
compute in fp32 whatever the dtype, read nothing on the host, add nothing atomically except integers, and so can be
captured in a CUDA graph and repeat themselves bit for bit. Their functions check no arguments: tensors must be
contiguous and on one device, the current one. How large a block each program works on stands in `blocks.json`.

A module of this folder imports Triton, which only CUDA builds of torch bring along: import it where `on_gpu` has said
yes.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the kernels take this tensor and its like; float64 is for the twins, which compute in it."""
    return _HAS_TRITON and tensor.is_cuda and tensor.dtype != torch.float64
