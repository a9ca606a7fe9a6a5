"""A letter of a tensor's name means one thing: it stands in the legend of `dsmoe.moe`, to which its file points."""

from __future__ import annotations

import ast
import re

import pytest

import dsmoe.moe
from tests.helpers.sources import sources

FOLDERS = ("dsmoe/moe", "dsmoe/nn", "dsmoe/kernels", "dsmoe/model", "dsmoe/parallel")
LEGEND_FILE = "dsmoe/moe/__init__.py"
ENTRY = re.compile(r"^    (\w)  \S", re.MULTILINE)
SUFFIXED = re.compile(r"_?[a-z]\w*?_(?=[0-9xn]*[A-Z])([A-Z0-9xn]+)")
"""A suffix has a capital letter, digits, and the legend's small letters; names of constants have no small letters."""
POINTER = "Shape suffixes: see `dsmoe.moe`"


def legend() -> list[str]:
    assert dsmoe.moe.__doc__ is not None
    return ENTRY.findall(dsmoe.moe.__doc__)


def suffixes(text: str) -> dict[str, str]:
    """The suffixed names of a file: variables, arguments, keywords, attributes, functions."""
    fields = ("id", "arg", "attr", "name")
    values = (getattr(node, field, None) for node in ast.walk(ast.parse(text)) for field in fields)
    names = {value for value in values if isinstance(value, str)}
    return {name: match[1] for name in names if (match := SUFFIXED.fullmatch(name))}


def strangers(text: str) -> list[str]:
    """The names with a letter that the legend lacks."""
    return sorted(name for name, suffix in suffixes(text).items() if set(re.sub(r"\d", "", suffix)) - set(legend()))


def test_the_legend_names_each_letter_once() -> None:
    letters = legend()
    assert len(letters) > 20
    assert letters == sorted(set(letters))


def test_every_letter_is_in_the_legend_and_every_file_points_there() -> None:
    found = {name: text for folder in FOLDERS for name, text in sources(folder).items() if suffixes(text)}
    assert len(found) > 15
    for name, text in found.items():
        assert not strangers(text), f"{name} has suffixes that {LEGEND_FILE} does not explain"
        assert POINTER in (ast.get_docstring(ast.parse(text)) or ""), f"{name} does not say: {POINTER}"


def test_every_letter_of_the_legend_is_used() -> None:
    used = "".join("".join(suffixes(text).values()) for folder in FOLDERS for text in sources(folder).values())
    assert set(legend()) <= set(used)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("scores_TE = logits_TE", []),
        ("def f(x_TQ): pass", ["x_TQ"]),
        ("layer.rows_4Q = key", ["rows_4Q"]),
        ("f(_mask_QT=1)", ["_mask_QT"]),
        ("by_group_TGx, mix_T2, x_Tn", []),
        ("NUM_QUEUES, Some_Q, get_QKV2", ["get_QKV2"]),
    ],
)
def test_what_is_a_suffix(text: str, names: list[str]) -> None:
    assert strangers(text) == names
