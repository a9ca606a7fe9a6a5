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

    def begin(self, training: bool) -> int | None:
        """Begin a pass: its number in the step, that of the earlier one where it repeats one; None in evaluation."""
        if not training:
            return None
        if self._repeated is not None:
            self._repeated += 1
            return self._repeated - 1
        self._count += 1
        return self._count - 1

    def seed(self, layer_seed: int, number: int | None) -> int:
        """What is random in a pass follows from this.

        It depends on (seed of the layer, step, number of the pass, rank) in training, and only on the layer's and the
        rank in evaluation, which so repeats itself.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        when = ("evaluation",) if number is None else (self.step, number)
        return seed_of(layer_seed, "random", *when, rank)

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
