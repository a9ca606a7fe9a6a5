"""What changing a key does to a run that has begun, read from the schema: what resume, import and parity go by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, get_args

from dsmoe.config.dump import spelled_out
from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Effect, Level, Section


def _marked(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Effect]]:
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        yield from ((key, mark) for mark in field.metadata if isinstance(mark, Effect))
        for section in _sections(field.annotation):
            yield from _marked(section, f"{key}.")


def _sections(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


EFFECTS: Mapping[str, Effect] = MappingProxyType(dict(_marked(Config)))
"""By key, in the schema's order; entries of a list have no number: `data.sources.weight`. `moe` is its being null."""


def keys_of(level: Level, prefix: str = "") -> list[str]:
    """The keys of one level, of all those that begin so."""
    return [key for key, effect in EFFECTS.items() if effect.level == level and key.startswith(prefix)]


def effect_of(key: str) -> Effect | None:
    """The effect of a key as `flatten` writes it; None if this version has no such key.

    `data.sources.0.weight` is that of every source's weight, and what is in a value, as `deepspeed.amp.enabled`, has
    the effect of that.
    """
    parts = [part for part in key.split(".") if not part.isdigit()]
    found = (EFFECTS.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((effect for effect in found if effect is not None), None)


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of a key."""
    effect = effect_of(key)
    return effect is not None and effect.level == "free"


def level_of_change(key: str, before: object, after: object) -> Level:
    """The level of a change of a key from one value to another; where nothing is known of it, no weights are of use."""
    effect = effect_of(key)
    if effect is None:
        return "tensor"
    if effect.switch is None:
        return effect.level
    try:
        is_across = effect.switch.is_on(before) != effect.switch.is_on(after)
    except TypeError:  # one of them, from a file, is no value of this key
        return "tensor"
    return effect.switch.level if is_across else effect.level


def tensor_part(config: Mapping[str, Any], weights_only: bool = False) -> dict[str, Any]:
    """What decides which tensors there are, their shapes and their meaning; what the tokenizer is, its contents decide.

    Args:
        config: resolved, maybe by another version of dsmoe: keys of `model` that are not of this one count as well.
        weights_only: leave out what decides only about tensors that may begin anew.

    Raises:
        KeyError, TypeError, AttributeError: it is none.
    """
    model = spelled_out({f"model.{key}": value for key, value in config["model"].items()})
    found = {key: value for key, value in model.items() if key not in EFFECTS or EFFECTS[key].level == "tensor"}
    is_dense = config.get("moe") is None
    found |= {"moe": None} if is_dense else {key: value_at(config, key) for key in keys_of("tensor", "moe.")}
    for key, effect in EFFECTS.items():
        if effect.switch is not None and not (is_dense and key.startswith("moe.")):
            is_on = effect.switch.is_on(value_at(config, key))
            if effect.switch.level == "tensor" or not weights_only:
                found[f"{key} {effect.switch.said}"] = is_on
    return found


def step_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a step is: the place in the data and the count of tokens follow from the steps.

    Raises:
        KeyError, TypeError: the config is none of dsmoe's.
    """
    return {key: value_at(config, key) for key in keys_of("step")}


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key.

    Raises:
        KeyError, TypeError: there is none.
    """
    return reduce(lambda node, part: node[part], key.split("."), config)
