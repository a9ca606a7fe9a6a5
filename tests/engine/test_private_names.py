"""DeepSpeed's private names, which a release may change without a word, occur in dsmoe/engine only."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers.sources import sources

FOLDERS = ("dsmoe", "launch", "docker", "benchmarks")
PRIVATE = re.compile(r"_(?!_)\w+")
"""One underscore in front: with two Python has other rules, and `_` alone is nobody's."""

NOT_ONLY_DEEPSPEEDS: dict[str, object] = {"_buffers": torch.nn.Module(), "_exit": os}
"""Names that DeepSpeed has too, and which dsmoe asks others for."""


def defined(tree: ast.AST) -> Iterator[str]:
    """The names of a file's functions, classes and variables, and of what it sets on objects, also by `setattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            yield from (each.value for each in node.args if isinstance(each, ast.Constant) and _is_text(each))
    yield from defined_for_itself(tree)


def defined_for_itself(tree: ast.AST) -> Iterator[str]:
    """The names of a file's functions, classes and variables, and of attributes of `self` and `cls`.

    Not those of other objects: `engine._step_applied = False` does not make the name the file's own.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def _is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_text(node: ast.Constant) -> bool:
    return isinstance(node.value, str)


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The names that a file asks other objects and modules for, with their lines: attributes, imports, texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and _is_text(node):
            yield node.lineno, node.value


@cache
def private_names() -> frozenset[str]:
    """Every name with one underscore in front that some module of the installed DeepSpeed defines."""
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    names: set[str] = set()
    for path in Path(spec.origin).parent.rglob("*.py"):
        names.update(defined(ast.parse(path.read_text(encoding="utf-8"))))
    return frozenset(name for name in names if PRIVATE.fullmatch(name)) - NOT_ONLY_DEEPSPEEDS.keys()


def found(text: str) -> list[tuple[int, str]]:
    """DeepSpeed's private names in a file, but for those that the file defines for objects of its own."""
    tree = ast.parse(text)
    own = set(defined_for_itself(tree))
    return [(line, name) for line, name in used(tree) if name in private_names() and name not in own]


@pytest.mark.parametrize("name", NOT_ONLY_DEEPSPEEDS)
def test_an_exempt_name_is_somebody_elses(name: str) -> None:
    assert hasattr(NOT_ONLY_DEEPSPEEDS[name], name)
    assert any(name in text for text in sources(*FOLDERS).values())


@pytest.mark.parametrize(
    "name",
    [
        "_hp_mapping",
        "_EXPERT_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP",
        "_WORLD_GROUP",
        "_get_expert_parallel_group",
        "_create_expert_and_data_parallel",
        "_global_grad_norm",
        "_gradient_reduction_buffer_dtype",
        "_step_applied",
        "_zero_padding",
    ],
)
def test_the_names_that_dsmoe_uses_are_known(name: str) -> None:
    assert name in private_names()


def test_they_occur_in_engine_only() -> None:
    files = sources(*FOLDERS)
    outside = {name: text for name, text in files.items() if not name.startswith("dsmoe/engine/")}
    assert len(outside) > 200
    places = [f"{file}:{line}: {name}" for file, text in outside.items() for line, name in found(text)]
    assert not places, "DeepSpeed's private names belong into dsmoe/engine/:\n" + "\n".join(places)


def test_engine_does_use_them() -> None:
    assert any(found(text) for name, text in sources("dsmoe").items() if name.startswith("dsmoe/engine/"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("link = parameter._hp_mapping", ["_hp_mapping"]),
        ("groups._EXPERT_DATA_PARALLEL_GROUP['a'] = handle", ["_EXPERT_DATA_PARALLEL_GROUP"]),
        ("engine._step_applied = False", ["_step_applied"]),
        ("norm = getattr(optimizer, '_global_grad_norm', None)", ["_global_grad_norm"]),
        ("from deepspeed.utils.groups import _get_expert_parallel_group as get", ["_get_expert_parallel_group"]),
        ("from deepspeed.utils import groups\ngroups._WORLD_GROUP = None", ["_WORLD_GROUP"]),
        ("class A:\n    def f(self):\n        self._hp_mapping = 1\n        return self._hp_mapping", []),
        ("def _hp_mapping(): pass\n_hp_mapping()", []),
        ("x.hp_mapping, x.__dict__, x._nothing_of_deepspeed", []),
    ],
)
def test_what_is_found(text: str, names: list[str]) -> None:
    assert [name for _, name in found(text)] == names
