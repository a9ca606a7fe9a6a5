"""Which forward pass of which step a layer is in: what is random in it follows from that, also when it is repeated."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch.distributed as dist

from dsmoe.parallel.draw import seed_of


class Passes:
    """Counts a layer's forward passes in training, step by step; activation checkpointing repeats some of them."""

    def __init__(self) -> None:
        self.step = 0
        """The optimizer step."""
        self._count = 0
        self._repeated: int | None = None

    def begin_step(self, step: int) -> None:
        """Start optimizer step `step`."""
        self.step = step
        self._count = 0

    @property
    def repeating(self) -> bool:
        """Whether the next pass repeats an earlier one."""
        return self._repeated is not None

    def begin(self, training: bool, seed: int) -> int:
        """Begin a pass of the layer that has `seed`: the seed of what is random in it.

        It follows from (seed of the layer, step, number of the pass in the step, rank) in training, where a repeated
        pass has the number of the earlier one, and only from the layer's and the rank in evaluation, which so repeats
        itself.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        if not training:
            return seed_of(seed, "random", "evaluation", rank)
        if self._repeated is not None:
            number = self._repeated
            self._repeated += 1
        else:
            number = self._count
            self._count += 1
        return seed_of(seed, "random", self.step, number, rank)

    def repeat_from_here(self) -> AbstractContextManager[None]:
        """A context in which the passes that come *next* are repeated, one after the other; it can be entered again."""
        return _Repeated(self, self._count)


class _Repeated(AbstractContextManager[None]):
    def __init__(self, passes: Passes, number: int) -> None:
        self._passes = passes
        self._number = number

    def __enter__(self) -> None:
        self._passes._repeated = self._number

    def __exit__(self, *_: object) -> None:
        self._passes._repeated = None
