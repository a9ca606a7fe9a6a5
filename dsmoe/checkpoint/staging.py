"""A copy of a rank's parts in host memory, which stays the same while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsmoe.checkpoint.state import Part

_ALIGNMENT = 8


class HostBuffer:
    """Host memory for the copies, the same for every save; pinned where a GPU copies into it."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Have this many bytes, which the system gives when they are written: now, not when training waits for it."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let go of the old memory first
            self._bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their elements in this memory. Ends when they are there; overwrites the copies before."""
        sizes = [part.here.numel() * part.here.element_size() for part in parts]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += size + -size % _ALIGNMENT
        self.reserve(end)
        copies = []
        for part, begin, size in zip(parts, begins, sizes, strict=True):
            there = self._bytes[begin : begin + size].view(part.here.dtype).view(part.here.shape)
            there.copy_(part.here, non_blocking=True)
            copies.append(replace(part, here=there))
        if self._on_gpu:
            torch.cuda.synchronize()
        return copies
