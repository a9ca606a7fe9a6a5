"""The configuration for DeepSpeed, taken by its own parser before anything slow begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.errors import UserError
from dsmoe.plan.plan import Plan


def accepted_by_deepspeed(plan: Plan) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, which DeepSpeed's own parser has taken.

    Raises:
        UserError: DeepSpeed refuses something in the `deepspeed` section; with the first key that it refuses by itself.
    """
    config, accumulation_steps = plan.config, plan.batch.accumulation_steps

    def refusal(section: dict[str, Any]) -> Exception | None:
        """Return what DeepSpeed's parser raises, if anything: it has no class of its own for a user's mistakes."""
        try:
            DeepSpeedConfig(to_deepspeed(config.model_copy(update={"deepspeed": section}), accumulation_steps))
        except Exception as error:
            return error
        return None

    reason = refusal(config.deepspeed)
    if reason is None:
        return to_deepspeed(config, accumulation_steps)
    if (ours := refusal({})) is not None:
        raise ours
    alone = ((f".{key}", refusal(section)) for key, section in _one_by_one(config.deepspeed))
    key, reason = next(((key, found) for key, found in alone if found is not None), ("", reason))
    raise UserError(f"deepspeed{key}: DeepSpeed refuses it: {' '.join(str(reason).split())}; change or remove it")


def _one_by_one(section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key of a section that has no keys below it, dotted, and the section with that alone."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{below}", {name: alone}) for below, alone in _one_by_one(value))
        else:
            yield name, {name: value}
