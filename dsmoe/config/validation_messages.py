"""Pydantic's findings in the words of the YAML file: key path, what is expected, what is there, where, and a remedy.

What is expected is read from the schema and not from pydantic's texts, so every wrong value of a key gets the same
wording, whichever rule it broke.
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
"""So many problems are explained: to guess what an unknown key means takes milliseconds."""


def explain(error: ValidationError, tree: Node) -> list[str]:
    """Return one line for each problem that pydantic found in `tree`."""
    explainer = _Explainer(tree)
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [explainer.line(one["type"], one["loc"]) for one in found[:MOST_SHOWN]]
    more = [f"... and {len(found) - MOST_SHOWN:,} more"] if len(found) > MOST_SHOWN else []
    return list(dict.fromkeys(filter(None, [*lines, *more])))


class _Explainer:
    """Knows the tree that was validated and the JSON Schema of what it should be."""

    def __init__(self, tree: Node) -> None:
        self.tree = tree
        self.root: Schema = Config.model_json_schema()

    def line(self, kind: str, location: Path) -> str | None:
        """Return the text for one finding; None if it is only a consequence of another, or of pydantic's ways."""
        found = self.follow(location)
        if found is None:
            return None
        path, schema, parent = found
        if kind == "extra_forbidden":
            return f"{_dotted(path)}: {self.unknown_key(path, parent)} ({self.where(path)})"
        if kind == "missing" and isinstance(path[-1], str):
            noun = "section" if self.members(schema) else "key"
            return f"{_dotted(path)}: required {noun} is missing ({self.where_missing(path)})"
        if kind == "missing":  # a list that is too short: what is wrong is the list
            path, schema = path[:-1], parent
        if kind == "too_short" and plain(lookup(self.tree, path)):  # pydantic counts only the entries that are right
            return None
        return f"{_dotted(path)}: {self.mismatch(path, schema)} ({self.where(path)})"

    def follow(self, location: Path) -> tuple[Path, Schema, Schema] | None:
        """Return pydantic's location as a path in the tree, with the schemas of the value and of what holds it.

        Where a value may be text or a mapping, pydantic reports every alternative under the name of its type. A
        mapping is then meant as the mapping; anything else is judged once, against the whole union.
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
        """Return the schema of a section's key or of a list's entry; empty for an unknown key."""
        if isinstance(part, int):
            return self.resolve(schema["prefixItems"][part] if "prefixItems" in schema else schema["items"])
        return self.resolve(schema.get("properties", {}).get(part, {}))

    def resolve(self, schema: Schema) -> Schema:
        """Follow a reference to a section, and keep what stands beside it, such as a default."""
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
        """Return what is probably meant by a key that its section does not have."""
        name = str(path[-1])
        own = self.members(section)
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
            closest_key(name, own, 0.8) or elsewhere.get(closest_key(name, elsewhere, 0.8)) or closest_key(name, own)
        )
        if guess:
            return f"unknown key; did you mean '{guess}'?"
        return f"unknown key; the keys here are {', '.join(own)}"

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
    # "maximum" is no rule of the key's, but a bound on what can be: it is said where a value exceeds it.
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    return " and".join(f" {sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)


def _exceeded(schema: Schema, value: float) -> float | None:
    """The schema's maximum, if the value is above it; of the alternatives where there are several."""
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
