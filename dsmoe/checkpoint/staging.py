"""A copy of a rank's parts in host memory, which stays the same while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsmoe.checkpoint.state import Part

_ALIGNMENT = 8


class HostBuffer:
    """Host memory for the copies, the same for every save; pinned where a GPU copies into it.

    It is made at once: pages that the system has yet to give would keep the first save several times as long.

    Args:
        size: how many bytes the copies take, about; there is more when they take more.
        on_gpu: whether what is copied is there.
    """

    def __init__(self, size: int, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._bytes = self._made(size)

    def _made(self, size: int) -> torch.Tensor:
        # Zeros, not empty: pages are given when they are written.
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their elements in this memory. Ends when they are there; overwrites the copies before."""
        sizes = [part.here.numel() * part.here.element_size() for part in parts]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += size + -size % _ALIGNMENT
        if len(self._bytes) < end:
            self._bytes = self._made(0)  # let go of the old memory first
            self._bytes = self._made(end)
        copies = []
        for part, begin, size in zip(parts, begins, sizes, strict=True):
            there = self._bytes[begin : begin + size].view(part.here.dtype).view(part.here.shape)
            there.copy_(part.here, non_blocking=True)
            copies.append(replace(part, here=there))
        if self._on_gpu:
            torch.cuda.synchronize()
        return copies
