"""The pages in docs/ name every option and link to what exists, and their code runs."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import dsmoe
from dsmoe.config import schema
from dsmoe.data import files, streams
from tests.helpers.layer_options import moe_layer

DOCS = Path(__file__).parents[1] / "docs"


SECTIONS = (dsmoe.Router, dsmoe.Balance, dsmoe.Capacity, dsmoe.Experts)
OPTIONS = [*map(list, (kind.model_fields for kind in SECTIONS)), [field.name for field in fields(dsmoe.Layout)]]


@pytest.mark.parametrize("keys", OPTIONS)
def test_the_layers_page_explains_every_key(keys: list[str]) -> None:
    page = (DOCS / "moe_layer.md").read_text(encoding="utf-8")
    assert not [key for key in keys if not re.search(rf"`{key}\b", page)]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_code_runs(page: Path) -> None:
    layer = moe_layer(8, expert_ffn_size=8, num_experts=2, target_drop_percent=1.0, bias_update_rate=0.1)
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, {"layers": [layer], "step": 0, "percent": 2.0, "applied": True})


def test_the_checkpoints_page_explains_every_key() -> None:
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert not [key for key in schema.Checkpoint.model_fields if f"| `{key}` |" not in page]


def test_the_corpora_page_names_every_format_and_compression() -> None:
    page = (DOCS / "corpora.md").read_text(encoding="utf-8")
    suffixes = {suffix for suffixes in files.SUFFIXES.values() for suffix in suffixes} | set(streams.SUFFIXES)
    assert not [suffix for suffix in suffixes - {".zstd"} if f"`{suffix}`" not in page]
