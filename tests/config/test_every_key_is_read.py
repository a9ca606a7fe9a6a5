"""A key that nothing reads is a promise that nobody keeps."""

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
    """Every attribute that some module loads, outside of what handles every key alike."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("schema.py", "validation_messages.py", "load.py", "dump.py") or path.parent.name == "sections":
            continue
        names |= {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
    return names


READ = attributes_read()
RULED = {"leak_future"}
"""Only a rule beside the section reads these."""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_of_the_section_is_read(section: type[BaseModel]) -> None:
    assert set(section.model_fields) - RULED <= READ
