"""YAML files of before the code was rebuilt load, and every key comes to the same value."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stored_files import DATA, VARIABLES, copy_for, resolved, yaml_files

RESOLVED: dict[str, dict[str, Any]] = json.loads((DATA / "resolved.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", yaml_files())
def test_every_key_has_the_value_that_it_had(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    now = resolved(name, copy_for(tmp_path))
    before = RESOLVED[name]
    assert {key: now.get(key, "no such key") for key in before} == before


def test_all_files_that_were_resolved_are_here() -> None:
    assert yaml_files() == sorted(RESOLVED)


def said_of(key: str, values: dict[str, Any]) -> set[tuple[str, str]]:
    """The values of a key; of a section that may be null or empty, those of all that is in it."""
    pattern = re.compile(re.escape(key).replace(r"sources\.0", r"sources\.\d+") + r"(\..*)?")
    return {(pattern.sub(r"\1", name), json.dumps(value)) for name, value in values.items() if pattern.fullmatch(name)}


def test_every_key_is_in_some_file_with_another_value_than_its_default() -> None:
    defaults = RESOLVED["minimal"]
    assert len(defaults) > 100
    for key in defaults:
        assert any(said_of(key, values) - said_of(key, defaults) for values in RESOLVED.values()), key
