"""A damaged or changed tokenizer.json is refused by its name, or gives valid tokens."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe.config.errors import UserError
from dsmoe.data.packing import pack
from dsmoe.data.tokenizer import load_tokenizer, require_end_of_document, token_dtype
from tests.data.conftest import MakeConfig
from tests.data.test_special_tokens import MODELS, saved
from tests.helpers import damage

TEXTS = ["ab <s>ab</s> a </s>", "", " ", "x\n\t", "γάμμα 𝄞", "<unk><0x0A>", "ab" * 500]
WRONG = [
    None,
    "x",
    "",
    -1,
    0,
    1,
    0.5,
    [],
    {},
    True,
    10**30,
    "</s>",
    ["a", "b"],
    [["a", 1]],
    {"</s>": 0},
    {"type": "BPE"},
]


def places_in(holder: Any) -> list[tuple[Any, Any]]:
    """Yield every value below as (parent, key or index)."""
    found = []
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        found.append((holder, key))
        if isinstance(value, dict | list):
            found += places_in(value)
    return found


def mutate(content: Any, draw: random.Random) -> None:
    """Exchange, remove or repeat some of the values."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        holder, key = draw.choice(places_in(content))
        if draw.random() < 0.2:
            del holder[key]
        elif draw.random() < 0.3:
            other, place = draw.choice(places_in(content))
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = draw.choice(WRONG)
        if not content:
            return


def use(path: Path, make_config: MakeConfig) -> None:
    """Tokenise text as `prepare` does; check that all are in the vocabulary and documents end only at the end token."""
    config = make_config({"name": "a", "path": "a"}, data={"tokenizer": str(path)}, vocab_size=2**20)
    tokenizer = load_tokenizer(config)
    require_end_of_document(tokenizer, config)
    target = path.with_name("tokens.bin")
    pack("a", TEXTS, tokenizer, 0, target)
    tokens = np.fromfile(target, token_dtype(tokenizer.vocab_size))
    assert (tokens < tokenizer.vocab_size).all()
    assert (tokens == tokenizer.end_of_document).sum() == len(TEXTS)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.fuzz)])
@pytest.mark.timeout(1800)
def test_any_file_is_refused_by_name_or_makes_tokens(count: int, tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "t.json"

    def spoil(draw: random.Random) -> tuple[str, str]:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        model = draw.choice(sorted(MODELS))
        saved(MODELS[model], path)
        if draw.random() < 0.3:
            damage_file = draw.choice(damage.WAYS)
            damage_file(path, draw)
            return f"{model} {damage_file.__name__}", "data.tokenizer"
        content = json.loads(path.read_bytes())
        mutate(content, draw)
        path.write_text(json.dumps(content), encoding="utf-8")
        return model, "data.tokenizer"

    outcomes = damage.outcomes_of(count, spoil, lambda: use(path, make_config), UserError, lambda _: True)
    assert not outcomes["other"], "\n".join(outcomes["other"])
    assert len(outcomes["refused"]) > count / 4
