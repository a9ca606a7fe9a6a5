"""Layouts as they are written, and configs made small: every recipe can be compared on every layout that it allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmoe.config import load_config
from dsmoe.plan.comparison import as_overrides, changes, comparable, parse_layout, shrunk
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
