"""What is right in a config some of whose keys are wrong: enough to check the rest."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dsmoe.config.schema import Config, Section

Place = tuple[str | int, ...]


class UnsoundError(Exception):
    """A key is wanted whose value is wrong or missing."""


class _Unsound:
    """In place of a section of which some keys are wrong: those that are right."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise UnsoundError(name)


def sound_part(tree: dict[str, Any], error: ValidationError) -> Any:
    """What looks like a `Config` to whoever reads only keys that are right; any other raises `UnsoundError`.

    Args:
        tree: the values, by section and key.
        error: what pydantic says of them.
    """
    wrong = [(found["loc"], found["type"]) for found in error.errors(include_url=False, include_context=False)]
    return _section(Config, tree, wrong, ())


def _section(kind: type[BaseModel], tree: Any, wrong: list[tuple[Place, str]], place: Place) -> Any:
    below = [(location, why) for location, why in wrong if location[: len(place)] == place]
    if not below and isinstance(tree, dict):
        return kind.model_validate(tree)
    if not isinstance(tree, dict):
        return _Unsound({})
    # A key that nobody knows may be one that is missing, mistyped: then its default is not what is meant.
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
    return _Unsound(values)


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, nullable or not; None for a value, a list or one of several kinds."""
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
