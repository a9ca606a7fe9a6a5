"""Compatibility of a checkpoint with the model and optimizer of a run, with a table of what differs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from dsmoe.config.effects import step_part, tensor_part
from dsmoe.config.errors import UserError
from dsmoe.plan.text import quantity, shown, table

Row = tuple[str, str, str]
"""A key, its value in the checkpoint, its value in this run."""

_SHOWN = 30


def check_fits(checkpoint: Path, manifest: Manifest, config: Mapping[str, Any], optimizer: str | None) -> None:
    """Check that a checkpoint is of the same model, steps and optimizer as the run.

    Args:
        checkpoint: for the message.
        manifest: the checkpoint's.
        config: the run's, resolved.
        optimizer: the run's; None where only weights are wanted.

    Raises:
        UserError: the checkpoint is of another; with a table of what differs.
        DamagedError: the checkpoint's config is none of dsmoe's, or the optimizer's state is missing.
    """
    try:
        saved, wanted = (tensor_part(c, weights_only=optimizer is None) for c in (manifest.facts.config, config))
        saved_steps, wanted_steps = step_part(manifest.facts.config), step_part(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{checkpoint / MANIFEST} is damaged: its config is none of dsmoe's ({shown(str(error))})"
        ) from None
    refuse(checkpoint, "another model", rows(saved, wanted))
    if optimizer is not None:
        refuse(checkpoint, "another optimizer", rows({"optimizer": manifest.facts.optimizer}, {"optimizer": optimizer}))
        if manifest.facts.schedule_step and not any(key.startswith("step/") for key in manifest.tensors):
            taken = quantity(manifest.facts.schedule_step, "step")
            raise DamagedError(
                f"{checkpoint / MANIFEST} is damaged: {taken} were taken, and there is no state of the optimizer"
            )
        refuse(
            checkpoint,
            "a run with other steps (for its weights alone: checkpoint.weights_from)",
            rows(saved_steps, wanted_steps),
        )


def rows(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Row]:
    """Return a row for each key whose values differ."""
    # A key that one side lacks differs: another version of dsmoe may have written the checkpoint.
    return [
        (key, str(saved.get(key, "absent")), str(wanted.get(key, "absent")))
        for key in {**saved, **wanted}
        if saved.get(key, "absent") != wanted.get(key, "absent")
    ]


def tensor_rows(manifest: Manifest, wanted: Mapping[str, tuple[int, ...]], kinds: Sequence[str]) -> list[Row]:
    """Return a row for each tensor that is missing or of another shape, and each one of `kinds` that is not wanted."""
    tensors = manifest.tensors.items()
    saved = {key: t.shape for key, t in tensors if key in wanted or key.partition("/")[0] in kinds}
    return rows(
        {key: list(shape) for key, shape in sorted(saved.items())},
        {key: list(shape) for key, shape in sorted(wanted.items())},
    )


def check_types(checkpoint: Path, manifest: Manifest, wanted: Mapping[str, str]) -> None:
    """Check that tensors have the types that they are read as (`F32`, by key): a copy would convert them in silence.

    Raises:
        DamagedError: one has another type; dsmoe has not written it.
    """
    for key, dtype in wanted.items():
        saved = manifest.tensors[key].dtype
        if saved != dtype:
            raise DamagedError(f"{checkpoint / MANIFEST} is damaged: {key} is {saved}, and is saved as {dtype}")


def refuse(checkpoint: Path, what: str, differing: Sequence[Row]) -> None:
    """Raise a UserError that shows the rows, if there are any."""
    if not differing:
        return
    lines = table([("key", "saved", "here"), *differing[:_SHOWN]], "<<<")
    more = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
    raise UserError(f"{checkpoint} is of {what}:\n  " + "\n  ".join([*lines, *more]))
