"""Triton kernels for the memory-bound steps around the experts' matrix products, one file each.

Every kernel has a twin in plain PyTorch, next to its caller, which defines what it computes and runs on a CPU. Kernels
compute in fp32 whatever the dtype, read nothing on the host, add nothing atomically except integers, and so can be
captured in a CUDA graph and repeat themselves bit for bit. Their functions check no tensors: these must be contiguous
and on one device, the current one. How large a block each program works on stands in `blocks.json`. What is chosen by
name is an entry of a registry, which has the kernel's code for it; a code that the kernel has no branch for does not
compile.

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


def kernel_code(name: str, code: str | None, registry: str, kernel: str) -> str:
    """The code by which a kernel knows the entry `name` of a registry.

    Raises:
        NotImplementedError: it has none.
    """
    if code is None:
        raise NotImplementedError(
            f"{name!r} of {registry} has no Triton kernel: add a branch for it to {kernel}, forward and backward, and "
            f"give the entry the code of that branch as `kernel`"
        )
    return code
