"""A copy of a rank's parts in host memory, which stays the same while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsmoe.checkpoint.state import Part

_ALIGNMENT = 8


class HostBuffer:
    """Host memory for the copies, the same for every save; pinned where a GPU copies into it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their elements in this memory. Ends when they are there; overwrites the copies before."""
        sizes = [part.here.numel() * part.here.element_size() for part in parts]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += size + -size % _ALIGNMENT
        on_gpu = any(part.here.is_cuda for part in parts)
        if len(self._bytes) < end:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let go of the old memory first
            self._bytes = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for part, begin, size in zip(parts, begins, sizes, strict=True):
            there = self._bytes[begin : begin + size].view(part.here.dtype).view(part.here.shape)
            there.copy_(part.here, non_blocking=True)
            copies.append(replace(part, here=there))
        if on_gpu:
            torch.cuda.synchronize()
        return copies
