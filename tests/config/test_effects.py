"""Every key says what another value of it does to a run that has begun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Effect, Section


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        sections = [
            part for part in _parts(field.annotation) if issubclass(part, Section) and part.__name__ != "Device"
        ]
        if sections:
            yield from leaves(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _parts(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


@pytest.mark.parametrize(("key", "field"), leaves(Config))
def test_every_key_has_one_effect(key: str, field: FieldInfo) -> None:
    assert len([mark for mark in field.metadata if isinstance(mark, Effect)]) == 1, key
