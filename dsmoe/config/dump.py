"""Output of a config: the resolved YAML that loads again, dotted keys, and the JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmoe.config.paths import write_paths
from dsmoe.config.schedules import default_decay_steps, with_decay_steps
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import write_yaml

_INCLUDE = {
    "description": "Files to start from, relative to this one; later ones win, and this file wins over all.",
    "title": "Include",
    "type": ["array", "string"],
    "items": {"type": "string"},
}


def dump_config(config: Config) -> str:
    """Return the resolved YAML, every default included; `load_config` reads it back to an equal `Config`."""
    return write_yaml(write_paths(config.model_dump()))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a dsmoe YAML file.

    No key is marked as required, because a file may leave any key to its includes; `dsmoe config check` reports missing
    keys.
    """
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["properties"] = {"include": _INCLUDE, **schema["properties"]}
    return schema


def with_nulls_resolved(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return flattened settings with nulls replaced by the values that follow from other settings.

    `model.num_kv_heads: null` with `model.num_heads: 8` becomes 8. Settings that are no config of dsmoe stay unchanged.
    """
    found = dict(flat)
    heads, width = flat.get("model.num_heads"), flat.get("model.hidden_size")
    if flat.get("model.num_kv_heads", heads) is None:
        found["model.num_kv_heads"] = heads
    if flat.get("model.head_dim", width) is None and type(width) is type(heads) is int and heads > 0:
        found["model.head_dim"] = width // heads
    steps = _steps(flat)
    decays = flat.get("optimizer.schedule") in with_decay_steps()
    if flat.get("optimizer.decay_steps", steps) is None and decays and steps:
        found["optimizer.decay_steps"] = default_decay_steps(steps)
    return found


def _steps(flat: Mapping[str, Any]) -> int | None:
    steps, tokens, batch = (flat.get(f"train.{key}") for key in ("steps", "tokens", "batch_tokens"))
    if steps is None and type(tokens) is type(batch) is int and batch > 0:
        return tokens // batch
    return steps if type(steps) is int else None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf by its dotted key, as in overrides: `data.sources.0.path`."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
