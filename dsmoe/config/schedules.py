"""Learning-rate schedules: the rate as a pure function of the step, and the registry of `optimizer.schedule`."""

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
    """The learning rate after the warm-up: constant at `lr`, then a decay until the end of the run."""

    decay: Callable[[float, float, float], float]
    """Returns the rate for (`lr`, `min_lr`, progress of the decay from 0 to 1); `lr` at progress 0."""
    takes_decay_steps: bool = False
    """True if the decay takes the last `optimizer.decay_steps` of the run, rather than all steps after the warm-up."""


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
"""Schedules by their names in `optimizer.schedule`; a new one needs an entry here and a name in the schema."""


def learning_rate(optimizer: Optimizer, steps: int, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) in a run of `steps`.

    The rate rises linearly to `lr` at the last of `warmup_steps`, then follows the schedule. With `wsd`, lr 1,
    min_lr 0, 8 steps, warmup_steps 2 and decay_steps 4:

        step    0    1    2    3    4     5    6     7
        rate    0.5  1    1    1    0.75  0.5  0.25  0

    Raises:
        UserError: there is no such schedule.
    """
    schedule = schedule_named(optimizer.schedule)
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = optimizer.decay_steps or default_decay_steps(steps) if schedule.takes_decay_steps else steps - warmup
    # Progress is 1 at the last step, steps - 1, so that the run ends at `min_lr` exactly.
    progress = min(max((step + 1 - (steps - decay)) / max(decay, 1), 0.0), 1.0)
    return schedule.decay(peak, floor, progress)


def schedule_named(name: str) -> Schedule:
    """Return the schedule of this name.

    Raises:
        UserError: there is no such schedule.
    """
    return entry_named(SCHEDULES, "optimizer.schedule", name)


def with_decay_steps() -> list[str]:
    """Return the names of the schedules to which `optimizer.decay_steps` applies."""
    return [name for name, schedule in SCHEDULES.items() if schedule.takes_decay_steps]


def default_decay_steps(steps: int) -> int:
    """Return the value of `optimizer.decay_steps: null` in a run of `steps`: a fifth of them."""
    return max(1, steps // 5)
