"""Begin a run: resume from its newest undamaged checkpoint, or take another run's weights, or start anew."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dsmoe.checkpoint.folder import all_checkpoints
from dsmoe.checkpoint.manifest import DamagedError, UnreadableError
from dsmoe.config.errors import UserError
from dsmoe.plan.text import shown
from dsmoe.runtime.processes import run_on_rank_0
from dsmoe.train.run_folder import Beginning, free_name, set_later_aside
from dsmoe.train.trainer import Trainer

logger = logging.getLogger(__name__)


def begin(trainer: Trainer, beginning: Beginning) -> bool:
    """Resume from the newest undamaged checkpoint and log why no newer one is taken; True if there was one."""
    for note in beginning.notes:
        logger.warning("%s", shown(note))
    for reason in beginning.passed_over:
        logger.warning("passed over: %s", reason)
    damaged: list[Path] = list(beginning.damaged)
    last, last_tried = None, Path()
    for checkpoint in beginning.checkpoints:
        try:
            trainer.resume(checkpoint)
        except UnreadableError:
            raise  # it may be whole
        except DamagedError as error:  # on every rank alike; another one is loaded over it, if any of it was
            logger.warning("passed over: %s", error)
            damaged.append(checkpoint)
            last, last_tried = error, checkpoint
            continue
        logger.info("continuing from %s", checkpoint)
        for path in run_on_rank_0(lambda: set_later_aside(trainer.checkpoints.folder, trainer.step_index, damaged)):
            logger.warning("set aside: %s", path)
        return True
    if last is not None and last_tried.parent.absolute() != trainer.checkpoints.folder.absolute():
        _refuse("checkpoint.resume", last_tried, last)
    if last is not None:
        raise UserError(
            f"there is no checkpoint in {trainer.checkpoints.folder} to go on from: {last}. Move them away to begin "
            f"anew, or give this run another name (name={free_name(trainer.plan.config)})"
        )
    if beginning.weights is not None:
        try:
            trainer.take_weights(beginning.weights)
        except UnreadableError:
            raise
        except DamagedError as error:
            _refuse("checkpoint.weights_from", beginning.weights, error)
        logger.info("beginning with the weights of %s", beginning.weights)
    return False


def _refuse(key: str, checkpoint: Path, error: DamagedError) -> NoReturn:
    """Refuse the checkpoint that a key names, on all ranks alike, of which one speaks."""

    def refuse() -> None:
        earlier: list[Path] = []
        with suppress(OSError, ValueError):  # no other checkpoints, or this one is not called like one
            siblings = all_checkpoints(checkpoint.parent)
            earlier = siblings[: siblings.index(checkpoint)]
        which = f" ({key}={earlier[-1]})" if earlier else ", or one of another run"
        raise UserError(f"{key}: {error}; name an earlier checkpoint{which}")

    run_on_rank_0(refuse)
    raise error  # not reached: every rank has raised the refusal
