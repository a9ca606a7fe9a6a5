"""The phases of a training step and of what comes between steps, marked by `with phase(Phase.FORWARD):`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from dsmoe.runtime.watchdog import SAVING, process_watchdog


class Phase(StrEnum):
    """The phases, in the words of failure reports."""

    DATA = "reading data"
    FORWARD = "forward pass"
    BACKWARD = "backward pass"
    OPTIMIZER = "optimizer step"
    AGREEMENT = "agreeing whether to stop"
    METRICS = "reducing metrics"
    EVALUATION = "evaluation"
    SAVE = SAVING


@contextmanager
def phase(what: Phase, step: int | None = None) -> Iterator[None]:
    """Mark what the block does; `step` is the optimizer step (from 1) that begins with it.

    Failure reports name the phase that began last: also for an error that leaves the block, and for what fails
    before the next phase. All ranks go through the same phases in the same order.
    """
    process_watchdog().record(what.value, step)
    yield
