"""The learning rate as a pure function of the step; a registry has all that depends on `optimizer.schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsmoe.config.registry import entry_named

if TYPE_CHECKING:
    from dsmoe.config.sections.optimizer import Optimizer


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate after the warm-up: it stays at `lr` until the decay, which ends with the run."""

    decay: Callable[[float, float, float], float]
    """The rate by `lr`, `min_lr` and the progress of the decay: 0 before it, where it has to be `lr`, to 1."""
    takes_decay_steps: bool = False
    """Whether the decay is the last `optimizer.decay_steps` of the run, not all that follows the warm-up."""


def _linear(peak: float, floor: float, progress: float) -> float:
    return peak + (floor - peak) * progress


def _half_cosine(peak: float, floor: float, progress: float) -> float:
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(_half_cosine),  # Loshchilov & Hutter 2017
    "wsd": Schedule(_linear, takes_decay_steps=True),  # warm-up, stable, decay: MiniCPM, arXiv 2404.06395
    "linear": Schedule(_linear),
    "constant": Schedule(lambda peak, floor, progress: peak),
}
"""By its name in `optimizer.schedule`; a further one is an entry here and a name in the schema."""


def learning_rate(optimizer: Optimizer, steps: int, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of a run of `steps`.

    It rises linearly over `warmup_steps`, reaching `lr` at the last of them, and then follows the schedule's decay.

    Raises:
        UserError: there is no such schedule.
    """
    schedule = schedule_named(optimizer.schedule)
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = optimizer.decay_steps or default_decay_steps(steps) if schedule.takes_decay_steps else steps - warmup
    # The last step, steps - 1, is at 1: the floor is reached, not only approached.
    progress = min(max((step + 1 - (steps - decay)) / max(decay, 1), 0.0), 1.0)
    return schedule.decay(peak, floor, progress)


def schedule_named(name: str) -> Schedule:
    """The registry's entry.

    Raises:
        UserError: it has none.
    """
    return entry_named(SCHEDULES, "optimizer.schedule", name)


def with_decay_steps() -> list[str]:
    """The names of the schedules to which `optimizer.decay_steps` applies."""
    return [name for name, schedule in SCHEDULES.items() if schedule.takes_decay_steps]


def default_decay_steps(steps: int) -> int:
    """What `optimizer.decay_steps: null` stands for in a run of `steps`: a fifth of them."""
    return max(1, steps // 5)
