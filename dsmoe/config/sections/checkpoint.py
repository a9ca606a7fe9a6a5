"""The section `checkpoint`: saving, retention, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import Interval, NoEffect, NonNegativeInt, PositiveInt, Section, Text
from dsmoe.config.suggestions import nearest_multiples_of

if TYPE_CHECKING:
    from dsmoe.config.sections.train import Train


class Checkpoint(Section):
    """Saving and retention of checkpoints, and resuming from them."""

    every: NoEffect[Interval] = None
    """Steps between checkpoints; null or 0 saves only after the last step."""
    keep: NoEffect[PositiveInt] = 2
    """The number of newest checkpoints that stay."""
    keep_every: NoEffect[Interval] = None
    """Checkpoints of steps that are multiples of this stay as well; null or 0 keeps none for its step."""
    keep_best: NoEffect[NonNegativeInt] = 0
    """The number of checkpoints with the lowest validation loss that stay as well, among those with an evaluation;
    counted per held-out text if that changed during the run, because losses on two texts do not compare."""
    asynchronous: NoEffect[bool] = True
    """Train on while a checkpoint is being written: training stands still for the copy to host memory only, which takes
    about 12 bytes per parameter, divided by the ranks."""
    resume: NoEffect[Text] = "auto"
    """`auto` continues the run folder's newest checkpoint if there is one, `always` insists on one, `never` refuses
    a folder that has one; anything else is the path of a checkpoint."""
    weights_from: NoEffect[Text | None] = None
    """Path of a checkpoint whose weights a run begins with, for fine-tuning: optimizer state, schedule, data and step
    begin anew. A run that has a checkpoint of its own continues that."""


def kept_problems(checkpoint: Checkpoint, train: Train) -> Iterator[Problem]:
    """Check that the checkpoints to be kept will exist."""
    every, milestones, best = checkpoint.every, checkpoint.keep_every, checkpoint.keep_best
    evaluations = train.eval_every
    if milestones is not None and (every is None or milestones % every):
        nearest = f"; nearest: {nearest_multiples_of(milestones, every)}" if every else "; set that"
        yield (
            "checkpoint.keep_every",
            f"checkpoint.keep_every ({milestones}) must be a multiple of checkpoint.every "
            f"({'null' if every is None else every}){nearest}",
        )
    if best and (every is None or evaluations is None or (every % evaluations and evaluations % every)):
        yield (
            "checkpoint.keep_best",
            f"checkpoint.keep_best ({best}) goes by evaluations of the steps that are saved: train.eval_every "
            f"({'null' if evaluations is None else evaluations}) and checkpoint.every "
            f"({'null' if every is None else every}) must be set, and one a multiple of the other",
        )
