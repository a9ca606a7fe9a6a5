"""Effects of changing a key of a run that has begun, read from the schema for resume, import and parity.

For example, with a key changed since the last checkpoint:

    key                       level     a resume
    observe.log_every         free      goes on
    optimizer.weight_decay    math      is refused; another run can go on from the checkpoint
    train.batch_tokens        step      is refused; another run can begin with the weights
    model.hidden_size         tensor    is refused; no weights are of use
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, get_args

from dsmoe.config.dump import with_nulls_resolved
from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Effect, Level, Section


def _marked_keys(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Effect]]:
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        yield from ((key, mark) for mark in field.metadata if isinstance(mark, Effect))
        for section in _sections(field.annotation):
            yield from _marked_keys(section, f"{key}.")


def _sections(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


EFFECTS: Mapping[str, Effect] = MappingProxyType(dict(_marked_keys(Config)))
"""Effect of every key, in the order of the schema.

Keys in a list have no number: `data.sources.weight`. The key `moe` is for a change between null and a section.
"""


def keys_at_level(level: Level, prefix: str = "") -> list[str]:
    """Return the keys of one level that begin with `prefix`."""
    return [key for key, effect in EFFECTS.items() if effect.level == level and key.startswith(prefix)]


def effect_of(key: str) -> Effect | None:
    """Return the effect of a key as written by `flatten`; None if this version has no such key.

    Numbers of list entries are ignored, and a part of a value has the effect of the whole value:

        data.sources.0.weight     as data.sources.weight
        deepspeed.amp.enabled     as deepspeed
    """
    parts = [part for part in key.split(".") if not part.isdigit()]
    found = (EFFECTS.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((effect for effect in found if effect is not None), None)


def is_free(key: str) -> bool:
    """Return whether a run may go on with another value of the key."""
    effect = effect_of(key)
    return effect is not None and effect.level == "free"


def level_of_change(key: str, before: object, after: object) -> Level:
    """Return the level of a key's change from one value to another; "tensor", the most severe, for an unknown key."""
    effect = effect_of(key)
    if effect is None:
        return "tensor"
    if effect.switch is None:
        return effect.level
    try:
        is_switched = effect.switch.is_on(before) != effect.switch.is_on(after)
    except TypeError:  # a value read from a file may be of another type than the key's
        return "tensor"
    return effect.switch.level if is_switched else effect.level


def tensor_part(config: Mapping[str, Any], weights_only: bool = False) -> dict[str, Any]:
    """Return the settings that decide which tensors exist, their shapes and their meaning, by dotted key.

    Without the tokenizer, which is compared by its contents.

    Args:
        config: a resolved config, perhaps of another version of dsmoe; its unknown keys of `model` are included.
        weights_only: leave out settings that decide only about tensors which may begin anew.

    Raises:
        KeyError, TypeError, AttributeError: `config` is no config of dsmoe.
    """
    model = with_nulls_resolved({f"model.{key}": value for key, value in config["model"].items()})
    found = {key: value for key, value in model.items() if key not in EFFECTS or EFFECTS[key].level == "tensor"}
    is_dense = config.get("moe") is None
    found |= {"moe": None} if is_dense else {key: value_at(config, key) for key in keys_at_level("tensor", "moe.")}
    for key, effect in EFFECTS.items():
        if effect.switch is not None and not (is_dense and key.startswith("moe.")):
            is_on = effect.switch.is_on(value_at(config, key))
            if effect.switch.level == "tensor" or not weights_only:
                found[f"{key} {effect.switch.condition}"] = is_on
    return found


def step_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the size of a step, by dotted key.

    The position in the data and the count of tokens follow from them and the number of steps.

    Raises:
        KeyError, TypeError: `config` is no config of dsmoe.
    """
    return {key: value_at(config, key) for key in keys_at_level("step")}


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key.

    Raises:
        KeyError, TypeError: there is no such key.
    """
    return reduce(lambda node, part: node[part], key.split("."), config)
