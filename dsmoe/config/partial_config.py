"""Partial config: the valid keys of a config with wrong keys, so that the rest can still be checked."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dsmoe.config.schema import Config, Section

Location = tuple[str | int, ...]


class InvalidKeyError(Exception):
    """A key was read whose value is wrong or missing."""


class _PartialSection:
    """The valid keys of a section; reading any other key raises InvalidKeyError."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise InvalidKeyError(name)


def valid_part(tree: dict[str, Any], error: ValidationError) -> Any:
    """Return an object with the valid keys of a `Config`; reading any other key raises `InvalidKeyError`.

    With `{name: a, model: {hidden_size: x, num_layers: 2}}`:

        valid_part(...).model.num_layers     2
        valid_part(...).model.num_kv_heads   None, the default
        valid_part(...).model.hidden_size    raises InvalidKeyError("hidden_size")

    Args:
        tree: the values, by section and key.
        error: pydantic's errors for `tree`.
    """
    wrong = [(found["loc"], found["type"]) for found in error.errors(include_url=False, include_context=False)]
    return _section(Config, tree, wrong, ())


def _section(kind: type[BaseModel], tree: Any, wrong: list[tuple[Location, str]], place: Location) -> Any:
    below = [(location, why) for location, why in wrong if location[: len(place)] == place]
    if not below and isinstance(tree, dict):
        return kind.model_validate(tree)
    if not isinstance(tree, dict):
        return _PartialSection({})
    # An unknown key may be a mistyped one of the section, so no missing key can be assumed to have its default.
    mistyped = any(why == "extra_forbidden" and len(location) == len(place) + 1 for location, why in below)
    values: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        is_wrong = any(location[len(place)] == name for location, _ in below if len(location) > len(place))
        section = _section_of(field)
        if name not in tree:
            if not mistyped and not is_wrong and not field.is_required():
                values[name] = field.get_default(call_default_factory=True)
        elif is_wrong and section is not None:
            values[name] = _section(section, tree[name], wrong, (*place, name))
        elif not is_wrong:
            values[name] = _value(field, tree[name])
    return _PartialSection(values)


def _section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, nullable or not; None for a value, a list or a union."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    one = kinds[0] if len(kinds) == 1 else None
    return one if isinstance(one, type) and issubclass(one, Section) else None


def _value(field: FieldInfo, value: Any) -> Any:
    section = _section_of(field)
    if section is not None:
        return None if value is None else section.model_validate(value)
    annotation: Any = field.rebuild_annotation()
    options = None if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ConfigDict(strict=True)
    return TypeAdapter(annotation, config=options).validate_python(value)
