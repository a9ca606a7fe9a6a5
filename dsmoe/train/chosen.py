"""Check that a run can resume from the checkpoints that it found, before anything is written for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dsmoe.checkpoint.compatibility import check_fits
from dsmoe.checkpoint.folder import inspect
from dsmoe.checkpoint.manifest import DamagedError, UnreadableError
from dsmoe.config.dump import flatten
from dsmoe.config.paths import is_path
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource
from dsmoe.plan.plan import Plan
from dsmoe.train.changed import Order, changed_order, changed_rate, setting_shown
from dsmoe.train.identity import changed_values

_START_KEYS = ("runs_dir", "data.cache_dir", "checkpoint.resume", "checkpoint.weights_from")
"""Keys by which a run begins and writes: another run has its own."""


def check_model(checkpoints: Iterable[Path], weights: Path | None, config: Config) -> None:
    """Check that the newest checkpoint, or the one whose weights are taken, is of this config's model.

    Which optimizer it is of, the engine compares, which has one.

    Raises:
        UserError: it is of another, or of other steps.
        DamagedError: there are checkpoints, and what they record of their runs is not what dsmoe records.
    """
    settings = config.model_dump(mode="json")

    def check(checkpoint: Path) -> None:
        manifest = inspect(checkpoint)
        check_fits(checkpoint, manifest, settings, manifest.facts.optimizer)

    _check_first(checkpoints, check)
    if weights is not None:
        check_fits(weights, inspect(weights), settings, None)


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """A line for each key by which this run differs from the one that saved a checkpoint of another run's folder.

    Paths and the names of the runs are left out: what is at the paths is compared by itself.
    """
    saved = {key: value for key, value in flatten(inspect(checkpoint).facts.config).items() if key != "name"}
    return [
        f"changed since {checkpoint} was saved: {key}, {setting_shown(old)} -> {setting_shown(new)}"
        for key, old, new in changed_values(saved, config)
        if key not in _START_KEYS and not (is_path(key, old) or is_path(key, new))
    ]


def check_order(checkpoints: Iterable[Path], plan: Plan, sources: Sequence[PreparedSource]) -> None:
    """Check that the run reads on where its newest checkpoint stopped.

    Raises:
        DamagedError: there are checkpoints, and what they record of their runs is not what dsmoe records.
        UserError: it would read other text, and `data.changed_order` does not accept it.
    """

    def check(checkpoint: Path) -> None:
        current = Order.of_run(plan.config, sources)
        facts = inspect(checkpoint).facts
        changed_rate(checkpoint, facts, plan)
        changed_order(checkpoint, facts, plan, current)

    _check_first(checkpoints, check)


def _check_first(checkpoints: Iterable[Path], check: Callable[[Path], None]) -> None:
    """Check the first that is not damaged: the run passes over the others, and says so."""
    damage = None
    for checkpoint in checkpoints:
        try:
            return check(checkpoint)
        except UnreadableError:
            raise
        except DamagedError as error:
            damage = error
    if damage is not None:
        raise DamagedError(f"{damage}. Go on from another checkpoint, or move this one away to begin anew")
