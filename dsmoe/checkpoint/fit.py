"""Whether a checkpoint is of the model and the optimizer that are to take it, and if not, what differs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from dsmoe.config.effects import step_part, tensor_part
from dsmoe.config.errors import UserError
from dsmoe.plan.text import quantity, shown, table

Row = tuple[str, str, str]
"""A key, its value in the checkpoint, its value here."""

_SHOWN = 30


def check_fits(checkpoint: Path, manifest: Manifest, config: Mapping[str, Any], optimizer: str | None) -> None:
    """Check that the checkpoint is of the same model.

    Args:
        checkpoint: for the message.
        manifest: its manifest.
        config: the resolved config here.
        optimizer: the optimizer here; None where only weights are wanted.

    Raises:
        UserError: it is of another; with a table of what differs.
        DamagedError: its config is none of dsmoe's, or the optimizer's state is missing.
    """
    try:
        saved, here = (tensor_part(c, weights_only=optimizer is None) for c in (manifest.facts.config, config))
        steps, steps_here = step_part(manifest.facts.config), step_part(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{checkpoint / MANIFEST} is damaged: its config is none of dsmoe's ({shown(str(error))})"
        ) from None
    refuse(checkpoint, "another model", rows(saved, here))
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
            rows(steps, steps_here),
        )


def rows(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[Row]:
    """The keys whose values differ."""
    return [
        (key, str(saved.get(key, "absent")), str(here.get(key, "absent")))
        for key in {**saved, **here}
        if saved.get(key, "absent") != here.get(key, "absent")
    ]


def tensor_rows(manifest: Manifest, wanted: Mapping[str, tuple[int, ...]], kinds: Sequence[str]) -> list[Row]:
    """The tensors that are missing there or have another shape, and those of these kinds that are not wanted here."""
    tensors = manifest.tensors.items()
    saved = {key: t.shape for key, t in tensors if key in wanted or key.partition("/")[0] in kinds}
    return rows(
        {key: list(shape) for key, shape in sorted(saved.items())},
        {key: list(shape) for key, shape in sorted(wanted.items())},
    )


def check_types(checkpoint: Path, manifest: Manifest, here: Mapping[str, str]) -> None:
    """Check that tensors have the types that they are read as (`F32`, by key): a copy would convert them in silence.

    Raises:
        DamagedError: one has another; dsmoe has not written it.
    """
    for key, dtype in here.items():
        saved = manifest.tensors[key].dtype
        if saved != dtype:
            raise DamagedError(f"{checkpoint / MANIFEST} is damaged: {key} is {saved}, and is saved as {dtype}")


def refuse(checkpoint: Path, what: str, differing: Sequence[Row]) -> None:
    """Raise the error that shows the rows, if there are any."""
    if not differing:
        return
    lines = table([("key", "saved", "here"), *differing[:_SHOWN]], "<<<")
    more = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
    raise UserError(f"{checkpoint} is of {what}:\n  " + "\n  ".join([*lines, *more]))
