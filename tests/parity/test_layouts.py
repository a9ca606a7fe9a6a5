"""Layouts as they are written, and configs made small: every recipe can be compared on every layout that it allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsmoe.config import load_config
from dsmoe.config.dump import flatten
from dsmoe.config.effects import effect_of
from dsmoe.config.schema import Config
from dsmoe.parity.layouts import _only, as_overrides, changes, comparable, parse_layout, shrunk
from dsmoe.plan.parameters import count_parameters

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TOGETHER = [["tp=1", "tp=2,sp=true,dp=2,zero=2", "tp=4", "tp=8"], ["tp=3", "tp=1,dp=2"]]
EXPERTS_TOGETHER = [["tp=2,ep=2,etp=2", "tp=4,ep=8,nodes=2,a2a=hierarchical", "tp=8,etp=4"]]


@pytest.mark.parametrize("texts", [*TOGETHER, *EXPERTS_TOGETHER], ids=", ".join)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_becomes_small_and_stays_valid(path: Path, texts: list[str]) -> None:
    config = load_config(path)
    if config.moe is None and texts in EXPERTS_TOGETHER:
        return
    layouts = [parse_layout(text) for text in texts]
    settings = {**comparable(config, 3, "fp32"), **shrunk(config, layouts, "sums.txt")}
    for layout in layouts:
        small = load_config(path, as_overrides({**settings, **layout.overrides}))
        assert count_parameters(small).total < 100_000_000
        assert small.train.steps == 3
        if config.moe is not None and small.moe is not None:
            assert small.moe.num_experts == config.moe.num_experts
            assert small.moe.top_k == config.moe.top_k
            assert small.moe.balance == config.moe.balance
            assert small.moe.capacity.drop_policy == config.moe.capacity.drop_policy


OF_THE_CORPUS = {
    *("data.sources.0.name", "data.sources.0.path", "data.tokenizer", "data.validation_fraction"),
    *("data.sources.0.hub", "data.sources.0.split", "data.sources.0.format", "data.sources.0.text_field"),
    *("data.sources.0.bad_records", "data.sources.0.weight", "model.max_sequence_length", "model.init_std"),
}
"""What shrinking changes besides sizes and free keys: the text, and what goes with it and with small sizes."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_changed_for_a_comparison_has_such_an_effect(path: Path) -> None:
    """Shrinking changes sizes, and never what a step computes; making comparable changes that, and no tensor."""
    config = load_config(path)
    layout = parse_layout("tp=2,dp=2")
    settings = comparable(config, 3, "fp32")
    without_drops = load_config(path, as_overrides(settings))
    settings |= {**shrunk(config, [layout], "sums.txt"), **layout.overrides}
    small = load_config(path, as_overrides(settings))
    for key, there, here in changed(config, without_drops):
        assert level_of(key) in ("math", "free"), (key, there, here)
    for key, there, here in changed(without_drops, small):
        is_size = all(value is None or type(value) is int for value in (there, here))
        level = level_of(key)
        assert level == "free" or (is_size and level in ("tensor", "step")) or key in OF_THE_CORPUS, (key, there, here)


def changed(config: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """The keys, with both values, but for those of sources that the other has not."""
    there, here = flatten(config.model_dump()), flatten(other.model_dump())
    return [(key, there[key], here[key]) for key in there if key in here and there[key] != here[key]]


def level_of(key: str) -> str:
    effect = effect_of(key)
    assert effect is not None, key
    return effect.level


@pytest.mark.parametrize("key", ["moe.num_experts", "moe.router.score", "train.seed", "nothing"])
def test_no_setting_of_another_effect_can_be_among_them(key: str) -> None:
    with pytest.raises(AssertionError, match=f"{key}: not of the effect step"):
        _only("step", {"train.batch_tokens": 256, "train.steps": 3, key: 2})


def test_a_layout_takes_the_fewest_ranks_that_its_degrees_can_do_with() -> None:
    assert parse_layout("tp=1").ranks == 1
    assert parse_layout("tp=2,ep=4").ranks == 4
    assert parse_layout("tp=4,ep=2").ranks == 4
    assert parse_layout("ep=2,etp=2,dp=8").ranks == 8
    assert parse_layout("ep=2,nodes=4").ranks == 4
    assert parse_layout("tp=2", world_size=6).ranks == 6
    assert parse_layout("tp=2", world_size=6).data == 3


def test_what_a_layout_does_not_name_has_its_default() -> None:
    overrides = parse_layout("ep=4,zero=2,chunks=3,train.recompute=full").overrides
    assert overrides == {
        "parallel.tensor": 1,
        "parallel.expert": 4,
        "parallel.expert_tensor": 1,
        "parallel.sequence": False,
        "parallel.all_to_all": "flat",
        "parallel.overlap_chunks": 3,
        "parallel.zero_stage": 2,
        "train.recompute": "full",
        "cluster.nodes": 1,
        "cluster.devices_per_node": 4,
        "cluster.device": "cpu",
    }


def test_changes_name_what_is_otherwise() -> None:
    config = load_config(CONFIGS[0])
    assert changes(config, {"train.seed": config.train.seed}) == []
    assert changes(config, {"train.seed": 7}) == [f"train.seed {config.train.seed} -> 7"]
