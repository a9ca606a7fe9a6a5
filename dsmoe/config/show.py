"""A configuration as text: the resolved YAML that loads again, and the JSON Schema that editors complete from."""

from __future__ import annotations

from typing import Any

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
    return write_yaml(config.model_dump())


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a dsmoe YAML file.

    No key is marked as required, because a file may leave any of them to what it includes; `dsmoe config check`
    tells what is missing in the end.
    """
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["properties"] = {"include": _INCLUDE, **schema["properties"]}
    return schema
