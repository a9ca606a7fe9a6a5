"""Messages for pydantic's validation errors: key path, expected and actual value, place in the file, and a remedy.

The expected value is described from the schema rather than with pydantic's text, so every wrong value of a key gets the
same wording, whichever rule it broke.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from dsmoe.config.schema import Config
from dsmoe.config.suggestions import closest_key
from dsmoe.config.synonyms import meant_by
from dsmoe.config.yaml_text import COMMAND_LINE, Node, lookup, plain, show_value

Schema = dict[str, Any]
Path = tuple[str | int, ...]
MOST_SHOWN = 50
"""The most problems that are explained, because a guess at an unknown key takes milliseconds."""


def explain(error: ValidationError, tree: Node) -> list[str]:
    """Return one line for each problem that pydantic found in `tree`."""
    explainer = _Explainer(tree)
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [explainer.line(one["type"], one["loc"]) for one in found[:MOST_SHOWN]]
    more = [f"... and {len(found) - MOST_SHOWN:,} more"] if len(found) > MOST_SHOWN else []
    return list(dict.fromkeys(filter(None, [*lines, *more])))


class _Explainer:
    """Explains errors by the validated tree and the JSON Schema."""

    def __init__(self, tree: Node) -> None:
        self.tree = tree
        self.root: Schema = Config.model_json_schema()

    def line(self, kind: str, location: Path) -> str | None:
        """Return the text for one error; None if the error only follows from another, or is an artefact of pydantic."""
        found = self.follow(location)
        if found is None:
            return None
        path, schema, parent = found
        if kind == "extra_forbidden":
            return f"{_dotted(path)}: {self.unknown_key(path, parent)} ({self.where(path)})"
        if kind == "missing" and isinstance(path[-1], str):
            noun = "section" if self.members(schema) else "key"
            return f"{_dotted(path)}: required {noun} is missing ({self.where_missing(path)})"
        if kind == "missing":  # a list that is too short: the problem is about the list
            path, schema = path[:-1], parent
        if kind == "too_short" and plain(lookup(self.tree, path)):  # pydantic counts the valid entries only
            return None
        return f"{_dotted(path)}: {self.mismatch(path, schema)} ({self.where(path)})"

    def follow(self, location: Path) -> tuple[Path, Schema, Schema] | None:
        """Return pydantic's location as a path in the tree, with the schemas of the value and of its parent.

        For a union of text and mapping, pydantic reports errors of every alternative, with the type's name in the
        location. A mapping is judged against the mapping alone; any other value once, against the whole union:

            cluster: {device: {memory_gib: x}}     ("cluster", "device", "Device", "memory_gib")
            becomes the path                       ("cluster", "device", "memory_gib")
        """
        path: Path = ()
        parent, schema = {}, self.root
        for part in location:
            options = [self.resolve(option) for option in schema.get("anyOf", []) if option.get("type") != "null"]
            if len(options) > 1:
                if not isinstance(lookup(self.tree, path).value, dict):
                    break
                mapping = next(option for option in options if "properties" in option)
                if part != mapping["title"]:
                    return None
                schema = mapping
                continue
            parent = options[0] if options else schema
            schema = self.child(parent, part)
            path = (*path, part)
        return path, schema, parent

    def child(self, schema: Schema, part: str | int) -> Schema:
        """Return the schema of a key of a section or of an entry of a list; empty for an unknown key."""
        if isinstance(part, int):
            return self.resolve(schema["prefixItems"][part] if "prefixItems" in schema else schema["items"])
        return self.resolve(schema.get("properties", {}).get(part, {}))

    def resolve(self, schema: Schema) -> Schema:
        """Return a reference's section, merged with the keywords beside the reference, such as a default."""
        if "$ref" not in schema:
            return schema
        section = self.root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        return {**section, **{key: value for key, value in schema.items() if key != "$ref"}}

    def members(self, schema: Schema) -> Schema:
        """Return the keys of a section, nullable or not; empty for any other value."""
        for option in (schema, *map(self.resolve, schema.get("anyOf", []))):
            if "properties" in option:
                return dict(option["properties"])
        return {}

    def where(self, path: Path) -> str:
        return lookup(self.tree, path).where

    def where_missing(self, path: Path) -> str:
        """Return the place of the section that lacks the key at `path`."""
        where = self.where(path[:-1])
        return f"section at {where}" if path[1:] and where != COMMAND_LINE else where

    def mismatch(self, path: Path, schema: Schema) -> str:
        value = plain(lookup(self.tree, path))
        expected = self.describe(schema)
        if isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
            expected = f"text of at most {schema['maxLength']} characters, and there are {len(value):,}"
        if isinstance(value, int | float) and (most := _exceeded(schema, value)) is not None:
            expected += f" and <= {most:g}" if " >" in expected else f" <= {most:g}"
        if isinstance(value, float) and not math.isfinite(value):
            expected = expected.replace("a number", "a finite number")
        return f"expected {expected}, got {show_value(value)}{_hint(schema, value)}"

    def describe(self, schema: Schema) -> str:
        """Return what a schema accepts, as a noun phrase."""
        schema = self.resolve(schema)
        if "anyOf" in schema:
            *others, last = [self.describe(option) for option in schema["anyOf"]]
            return f"{', '.join(others)} or {last}"
        if "enum" in schema:
            return f"one of {', '.join(map(str, schema['enum']))}"
        if schema["type"] == "array":
            return self.describe_list(schema)
        if schema["type"] == "object":
            keys = self.members(schema)
            return f"a mapping {{{', '.join(keys)}}}" if keys else "a mapping"
        noun = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
        return noun.get(schema["type"], "text") + _limits(schema)

    def describe_list(self, schema: Schema) -> str:
        if "prefixItems" in schema:
            entries = dict.fromkeys(self.describe(entry) for entry in schema["prefixItems"])
            return f"a list of {len(schema['prefixItems'])} entries, each {' and '.join(entries)}"
        return f"a list of at least {schema.get('minItems', 0)}"

    def unknown_key(self, path: Path, section: Schema) -> str:
        """Return the message for a key that its section does not have, with the key that is probably meant."""
        name = str(path[-1])
        in_section = self.members(section)
        sections = dict(self.sections("", self.root))
        if "." in name:
            return "unknown key; dots are for the command line, in a file a section is indented below its name"
        homes = [home for home, keys in sections.items() if name in keys]
        if homes:
            return f"unknown key; {_belongs(name, homes)}"
        if synonym := meant_by(name):
            return f"unknown key; {synonym}"
        elsewhere = {key: _join(home, key) for home, keys in sections.items() for key in keys}
        guess = (
            closest_key(name, in_section, 0.8)
            or elsewhere.get(closest_key(name, elsewhere, 0.8))
            or closest_key(name, in_section)
        )
        if guess:
            return f"unknown key; did you mean '{guess}'?"
        return f"unknown key; the keys here are {', '.join(in_section)}"

    def sections(self, path: str, schema: Schema) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield every section's dotted path and keys; a list of sections is entered at its first entry."""
        keys = self.members(schema)
        yield path, keys
        for key, child in keys.items():
            child = self.resolve(child)
            below = _join(path, key)
            if "items" in child:
                child, below = self.resolve(child["items"]), f"{below}.0"
            if self.members(child):
                yield from self.sections(below, child)


def _closest(name: str, names: Iterable[str], cutoff: float) -> str:
    return next(iter(get_close_matches(name, names, 1, cutoff)), "")


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _belongs(name: str, homes: list[str]) -> str:
    if homes == [""]:
        return "it belongs at the top level"
    sections = " or ".join(f"'{home.removesuffix('.0')}'" if home else "the top level" for home in homes)
    return f"it belongs to {sections}: {' or '.join(_join(home, name) for home in homes)}"


def _limits(schema: Schema) -> str:
    if "pattern" in schema:
        return f" that matches {schema['pattern']}"
    if "minLength" in schema:
        return " that is not empty"
    # "maximum" is left out, as a bound far above useful values: `mismatch` adds it when a value exceeds it.
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    return " and".join(f" {sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)


def _exceeded(schema: Schema, value: float) -> float | None:
    """Return the maximum in the schema, or in one of its alternatives, that the value exceeds; None without one."""
    for option in (schema, *schema.get("anyOf", [])):
        if "maximum" in option and value > option["maximum"] and value != math.inf:
            return float(option["maximum"])
    return None


def _hint(schema: Schema, value: Any) -> str:
    if "enum" in schema:
        guess = _closest(str(value), map(str, schema["enum"]), 0.6)
        return f"; did you mean '{guess}'?" if guess else ""
    if schema.get("type") == "string" and isinstance(value, int | float):
        return "; put it in quotes"
    if schema.get("type") == "object" and value is None and "default" in schema:
        return "; leave the key out to get its defaults"
    return ""
