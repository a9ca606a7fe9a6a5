"""Every key of the schema is read by some module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

import dsmoe
from dsmoe.config import schema

SECTIONS = [s for s in vars(schema).values() if isinstance(s, type) and issubclass(s, schema.Section)]
PACKAGE = Path(dsmoe.__file__).parent


def attributes_read() -> set[str]:
    """Return every attribute that some module reads, except the modules that handle all keys alike."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("schema.py", "validation_messages.py", "load.py", "dump.py") or path.parent.name == "sections":
            continue
        names |= {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
    return names


READ = attributes_read()
RULED = {"leak_future"}
"""Keys that only a rule beside their section reads."""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_of_the_section_is_read(section: type[BaseModel]) -> None:
    assert set(section.model_fields) - RULED <= READ
