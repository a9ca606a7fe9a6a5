"""Conversion of a Hugging Face config to the `model` and `moe` sections that describe the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.dump import flatten, with_nulls_resolved
from dsmoe.config.effects import keys_at_level
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.architectures.parts import Settings
from dsmoe.plan.layers import dense_layers

_ANY_RUN: dict[str, Any] = {
    "name": "any",
    "data": {"sources": ({"name": "any", "path": "any"},), "tokenizer": "any.json"},
    "optimizer": {"lr": 1.0},
    "train": {"steps": 1, "batch_tokens": 1, "sequence_length": 1},
}
_KINDS_OF_LAYERS = ("model.dense_layers", "model.moe_every", "model.ffn_size")
"""Keys that are compared as the list of dense layers, and the width of these if there are any."""
_GROUPS = ("moe.router.num_groups", "moe.router.top_k_groups", "moe.router.group_score")
"""Keys that mean nothing where there is one group."""


def sections_of(settings: Settings) -> dict[str, Any]:
    """Return the `model` and `moe` sections, without keys that have dsmoe's default.

    Raises:
        UserError: the model does something that dsmoe's cannot; with each key, value and what is needed.
    """
    architecture = architecture_of(settings)
    problems = architecture.settings_refusals(settings)
    if problems:
        raise UserError("\n  ".join(["the model does what ours cannot:", *problems]))
    sections = architecture.sections(settings)
    problems = list(_unloadable(sections))
    if problems:
        raise UserError("\n  ".join(["the model does what ours cannot; as sections of ours:", *problems]))
    return sections


def _unloadable(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems that the sections have in any run's config."""
    try:
        config = Config.model_validate({**_ANY_RUN, **sections})
    except ValidationError as error:
        yield from (
            f"{'.'.join(map(str, found['loc']))} ({found['input']}): {found['msg']}" for found in error.errors()
        )
        return
    problems = cross_field_problems(config)
    yield from (message for key, message in problems if key.partition(".")[0] in sections)


def describe(config: Config) -> dict[str, Any]:
    """Describe what a model computes from its weights, by dsmoe's keys; equal where configs differ in spelling only."""
    settings, dense = with_nulls_resolved(flatten(config.model_dump())), dense_layers(config)
    found = {key: settings[key] for key in keys_at_level("tensor", "model.") if key not in _KINDS_OF_LAYERS}
    found["dense layers"] = ", ".join(map(str, dense)) or "none"
    if dense:
        found["model.ffn_size"] = settings["model.ffn_size"]
    if config.moe is not None and len(dense) < config.model.num_layers:
        unused = _GROUPS if config.moe.router.num_groups == 1 else ()
        found |= {key: settings[key] for key in keys_at_level("tensor", "moe.") if key not in unused}
    return found
