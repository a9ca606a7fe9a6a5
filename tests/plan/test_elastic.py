"""A run on other devices: the degrees follow, the batch stays, and what cannot be names the nearest that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsmoe.config import UserError, load_config
from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.plan.batch import Batch
from dsmoe.plan.elastic import adjustments, fit_to_world

QWEN = Path(__file__).parents[2] / "configs" / "qwen3_30b_a3b.yaml"  # 8 x 8 devices, 128 experts, degree 8


def fitted(nodes: int, devices: int, *overrides: str) -> dict[str, Any]:
    config = load_config(QWEN, overrides)
    found = fit_to_world(config, nodes, devices)
    assert cross_field_problems(found) == []
    batch = Batch.from_config(found)
    assert batch.tokens_per_step == config.train.batch_tokens
    assert batch.topology.world_size == nodes * devices
    assert found.model == config.model
    parallel = found.parallel
    return {"expert": parallel.expert, "micro": found.train.micro_batch_size, "all_to_all": parallel.all_to_all}


def test_the_configs_own_devices_change_nothing() -> None:
    config = load_config(QWEN)
    assert fit_to_world(config, config.cluster.nodes, config.cluster.devices_per_node) is config


def test_adjustments_are_said() -> None:
    config = load_config(QWEN)
    assert adjustments(config, fit_to_world(config, 1, 4)) == [
        "cluster.nodes 8 -> 1",
        "cluster.devices_per_node 8 -> 4",
        "parallel.expert 8 -> 4",
    ]


@pytest.mark.parametrize(("nodes", "devices", "expert"), [(4, 8, 8), (1, 8, 8), (1, 4, 4), (2, 2, 4), (1, 1, 1)])
def test_the_expert_degree_stays_if_it_can_and_else_comes_down(nodes: int, devices: int, expert: int) -> None:
    assert fitted(nodes, devices)["expert"] == expert


def test_the_micro_batch_comes_down_where_the_batch_asks_for_it() -> None:
    sequences = load_config(QWEN).train.sequence_length
    batch = f"train.batch_tokens={64 * 4 * sequences}"
    assert fitted(8, 8, batch, "train.micro_batch_size=4")["micro"] == 4
    assert fitted(16, 8, batch, "train.micro_batch_size=4")["micro"] == 2
    assert fitted(32, 8, batch, "train.micro_batch_size=4")["micro"] == 1


def test_two_levels_become_one_where_there_are_not_two() -> None:
    overrides = ("parallel.expert=16", "parallel.all_to_all=hierarchical")
    assert fitted(4, 8, *overrides) == {"expert": 16, "micro": 2, "all_to_all": "hierarchical"}
    assert fitted(4, 12, *overrides, "train.batch_tokens=12582912")["all_to_all"] == "flat"


def test_what_cannot_be_names_the_nearest_numbers_of_nodes() -> None:
    with pytest.raises(
        UserError, match=r"^7 nodes x 8 devices cannot train.*batch_tokens.*nearest that can: 4 or 8 nodes$"
    ):
        fit_to_world(load_config(QWEN), 7, 8)
    with pytest.raises(UserError, match=r"3 nodes x 5 devices.*parallel.tensor \(2\) must divide"):
        fit_to_world(load_config(QWEN, ["parallel.tensor=2"]), 3, 5)
