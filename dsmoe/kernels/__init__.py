"""Triton kernels for the memory-bound steps around the experts' matrix products, one file each.

Every kernel has a twin in plain PyTorch, next to its caller, which defines what it computes and runs on a CPU. Kernels
compute in fp32 whatever the dtype, read nothing on the host, add nothing atomically except integers, and so can be
captured in a CUDA graph and repeat themselves bit for bit. Their functions check no tensors: these must be contiguous
and on one device, the current one. The block sizes of the programs stand in `blocks.json`. A choice by name is an entry
of a registry, which has the code of the kernel's branch; a code without a branch does not compile.

A leaf: nothing of dsmoe is imported but this folder. Its modules import Triton, which only CUDA builds of torch bring
along: import them where `on_gpu` is true.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch

_HAS_TRITON = find_spec("triton") is not None


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether the kernels take this tensor and its like; float64 is for the twins, which compute in it."""
    return _HAS_TRITON and tensor.is_cuda and tensor.dtype != torch.float64


class Entry(Protocol):
    """The part of a registry's entry that kernels read: a `Score`, an `Activation`."""

    @property
    def name(self) -> str:
        """Its key in the registry."""

    @property
    def kernel(self) -> str | None:
        """The code of the kernel's branch for it; None without one."""


def kernel_code(entry: Entry, registry: str, kernel: str) -> str:
    """Return the code of the kernel's branch for an entry.

    Args:
        entry: the entry.
        registry: the registry's name, for the message.
        kernel: the kernel's module, for the message.

    Raises:
        NotImplementedError: the kernel has no branch for it.
    """
    if entry.kernel is None:
        raise NotImplementedError(
            f"{entry.name!r} of {registry} has no Triton kernel: add a branch for it to {kernel}, forward and "
            f"backward, and give the entry the code of that branch as `kernel`"
        )
    return entry.kernel
