"""The pages in docs/ name every option and link to what exists, and their code runs."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import dsmoe
from dsmoe.config import schema
from dsmoe.data import corpus_files, decompression
from dsmoe.runtime.launchers import LAUNCHERS
from tests.helpers.layer_options import moe_layer
from tests.helpers.sources import REPOSITORY

DOCS = REPOSITORY / "docs"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
PAGES = [REPOSITORY / "README.md", CONTRIBUTING, *sorted(DOCS.glob("*.md"))]


SECTIONS = (dsmoe.Router, dsmoe.Balance, dsmoe.Capacity, dsmoe.Experts)
OPTIONS = [*map(list, (kind.model_fields for kind in SECTIONS)), [field.name for field in fields(dsmoe.Layout)]]


@pytest.mark.parametrize("keys", OPTIONS)
def test_the_layers_page_explains_every_key(keys: list[str]) -> None:
    page = (DOCS / "moe_layer.md").read_text(encoding="utf-8")
    assert not [key for key in keys if not re.search(rf"`{key}\b", page)]


def test_the_layers_page_names_every_choice() -> None:
    page = (DOCS / "moe_layer.md").read_text(encoding="utf-8")
    choices = [
        (key, value)
        for kind in SECTIONS
        for key, field in kind.model_fields.items()
        for value in get_args(field.annotation)
        if isinstance(value, str) and value != field.default
    ]
    assert choices
    assert not [choice for choice in choices if not re.search(r"`({}: )?{}`".format(*choice), page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for link, section in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not section or section in anchors(target), f"{link}#{section}"


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_runs(page: Path) -> None:
    layer = moe_layer(8, expert_ffn_size=8, num_experts=2, target_drop_percent=1.0, bias_update_rate=0.1)
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, {"layers": [layer], "step": 0, "percent": 2.0, "applied": True})


def test_the_checkpoints_page_explains_every_key() -> None:
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert not [key for key in schema.Checkpoint.model_fields if f"| `{key}` |" not in page]


def test_the_corpora_page_names_every_format_and_compression() -> None:
    page = (DOCS / "corpora.md").read_text(encoding="utf-8")
    suffixes = {suffix for suffixes in corpus_files.SUFFIXES.values() for suffix in suffixes} | set(
        decompression.SUFFIXES
    )
    assert not [suffix for suffix in suffixes - {".zstd"} if f"`{suffix}`" not in page]


def test_the_clusters_page_names_every_launcher() -> None:
    page = (DOCS / "clusters.md").read_text(encoding="utf-8")
    assert not [each.name for each in LAUNCHERS if f"`{each.name.partition(' (')[0]}`" not in page]


def test_the_map_names_every_room_in_the_order_that_is_checked() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    order = re.search(r"```\n(cli\n.*?)```", page, re.DOTALL)
    assert order is not None
    assert order.group(1).splitlines() == [layer.replace("dsmoe.", "") for layer in layers]
    rooms = {path.parent.name for path in (REPOSITORY / "dsmoe").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `dsmoe/(\w+)` \|", page, re.MULTILINE)) == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path from the repository's root, and a module or an attribute of one by its dotted name."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:dsmoe|tests|benchmarks|launch|docker|configs|docs)/[\w./-]*)(?::\d+|::\w+)?`", text)
    assert not [path for path in paths if "NAME" not in path and not (REPOSITORY / path).exists()]
    names = re.findall(r"`(dsmoe(?:\.\w+)+)(?:\(.*?\))?`", text)
    assert not [name for name in names if not is_defined(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_that_are_named_exist(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    named = re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not set(named) - set(targets)


def test_the_first_changes_name_what_is_in_the_files() -> None:
    """In a step that begins with a file, each name in backquotes is in that file."""
    steps = re.findall(r"^\d\. `([\w/.]+)`: (.*(?:\n   .*)*)", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(steps) >= 12
    for file, step in steps:
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        names = re.findall(r"`(\w+)`", step)
        assert not [name for name in names if name not in text], file


def is_defined(name: str) -> bool:
    """Whether a dotted name leads from the package to a module or an attribute."""
    value: object = dsmoe
    for part in name.split(".")[1:]:
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = import_module(f"{getattr(value, '__name__', '')}.{part}")
            except ImportError:
                return False
    return True
