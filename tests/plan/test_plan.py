"""What `dsmoe plan` prints: every number is the planner's, for every recipe, at once and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.load import load_config
from dsmoe.config.schema import Config
from dsmoe.plan import AXES, Batch, Plan, Topology, count_parameters, flops_per_token
from tests.helpers.plan_configs import make_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
MOE = {"num_experts": 8, "top_k": 2, "expert_ffn_size": 16}


def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", [])


def cut_and_folded() -> Config:
    """Two nodes of 8: a copy of the experts, each in two slices, is spread over both."""
    return make_config(
        cluster={"nodes": 2, "devices_per_node": 8},
        parallel={"tensor": 4, "expert": 8, "expert_tensor": 2, "all_to_all": "hierarchical", "sequence": True},
        moe=MOE,
        train={"batch_tokens": 4 * 32},
    )


def big(nodes: int) -> Config:
    return make_config(
        cluster={"nodes": nodes, "devices_per_node": 8},
        parallel={"tensor": 4, "expert": 64, "expert_tensor": 2, "all_to_all": "hierarchical"},
        moe={**MOE, "num_experts": 128},
        train={"batch_tokens": nodes * 8 // 4 * 32},
    )


def block(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under `heading`, without it."""
    (lines,) = [part.splitlines() for part in text.split("\n\n") if part.startswith(heading)]
    return [line.split() for line in lines[1:] if line.startswith("  ")]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", RECIPES)
def test_the_text_has_the_planners_numbers(name: str) -> None:
    config = recipe(name)
    text, topology, counts = Plan.from_config(config).text(), Topology.from_config(config), count_parameters(config)
    held, flops = (
        counts.per_device(topology),
        flops_per_token(config, counts),
    )
    assert text.startswith(f"{name}: world size {topology.world_size} (")
    assert f"\nparameters: {counts.total:,} total, {counts.active:,} active per token\n" in text
    assert f"\nranks: {topology.world_size} = {topology.data} data x {topology.tensor} tensor; " in text
    assert f"\nbatch: {Batch.from_config(config).explain()}\n" in text
    assert f"\neach device holds {held.total:,} = {held.shared:,} shared + {held.experts:,} of experts\n" in text
    assert f"{flops.forward:,} forward, {flops.training:,} forward and backward" in text

    parts = {part: (number(total), number(active)) for part, total, active in block(text, "parameters  ")}
    assert parts.pop("all") == (counts.total, counts.active)
    assert parts == {part: both for part, both in counts.parts().items() if both[0]}


@pytest.mark.parametrize("config", [*map(recipe, RECIPES), cut_and_folded()], ids=[*RECIPES, "cut_and_folded"])
def test_the_table_of_groups_is_what_the_groups_are(config: Config) -> None:
    topology = Topology.from_config(config)
    groups = {axis: topology.groups(axis) for axis in AXES}
    if levels := topology.exchange_levels():
        groups = {**groups, "exchange_across": levels[0], "exchange_inside": levels[1]}
    plan = Plan.from_config(config)
    rows = {axis: cells for axis, *cells in block(plan.text(), "process groups")}
    assert list(rows) == list(groups) == list(plan.json()["groups"])
    for axis, (size, count, stride, nodes, *ranks) in rows.items():
        first = groups[axis][0]
        assert (number(size), number(count)) == (len(first), len(groups[axis]))
        assert stride == (f"{first[1] - first[0]:,}" if len(first) > 1 else "-")
        assert number(nodes) == max(len({topology.node_of(rank) for rank in group}) for group in groups[axis])
        assert ranks[-1] == str(first[-1])
        shown = ranks[: ranks.index("...")] if "..." in ranks else ranks
        assert shown == [str(rank) for rank in first[: len(shown)]]
        assert len(ranks) == min(len(first), 5 if "..." in ranks else 4)


def test_where_tokens_travel() -> None:
    def sentence(config: Config) -> list[str]:
        return [line for line in Plan.from_config(config).text().splitlines() if "travel" in line]

    assert sentence(cut_and_folded()) == [
        "tokens travel among the 16 ranks of an exchange group, over 2 nodes (hierarchical)"
    ]
    assert sentence(recipe("mixtral_8x7b")) == ["tokens travel among the 8 ranks of an exchange group, inside a node"]
    assert sentence(recipe("tiny_cpu_dense")) == []
    alone = make_config(moe=MOE, cluster={"devices_per_node": 2})
    assert sentence(alone) == ["every rank holds all experts: no token travels"]


def test_who_holds_which_experts() -> None:
    text = Plan.from_config(cut_and_folded()).text()
    rows = [" ".join(cells) for cells in block(text, "experts on the first node, of 8 in each of 3 MoE layers")]
    assert rows == [f"rank {rank} expert {rank // 2}, slice {rank % 2 + 1} of 2" for rank in range(8)]
    trillion = Plan.from_config(recipe("trillion")).text()
    rows = [" ".join(cells) for cells in block(trillion, "experts on the first node, of 384 in each of 60 MoE layers")]
    assert rows == [f"rank {rank} experts {3 * rank} to {3 * rank + 2}" for rank in range(8)]


def test_a_node_of_many_devices_is_shown_in_part() -> None:
    config = make_config(
        cluster={"devices_per_node": 72}, parallel={"expert": 8}, moe=MOE, train={"batch_tokens": 72 * 32}
    )
    rows = block(Plan.from_config(config).text(), "experts on the first node")
    assert [cells[:2] for cells in rows] == [*(["rank", str(rank)] for rank in range(7)), ["..."], ["rank", "71"]]
    assert len(Plan.from_config(config).held_by_first_node) == 72


@pytest.mark.parametrize("config", [*map(recipe, RECIPES), cut_and_folded()], ids=[*RECIPES, "cut_and_folded"])
def test_the_json_has_the_planners_numbers(config: Config) -> None:
    plan: Any = json.loads(json.dumps(Plan.from_config(config).json()))
    topology, counts, batch = Topology.from_config(config), count_parameters(config), Batch.from_config(config)
    held, flops = (
        counts.per_device(topology),
        flops_per_token(config, counts),
    )
    assert plan["name"] == config.name
    sizes = {axis: topology.degree(axis) for axis in AXES}
    machine = {"nodes": topology.nodes, "devices_per_node": topology.devices_per_node}
    assert plan["ranks"] == {"total": topology.world_size, **machine, **sizes}
    assert plan["batch"] == {
        "data_ranks": topology.data,
        "micro_batch_size": config.train.micro_batch_size,
        "sequence_length": config.train.sequence_length,
        "accumulation_steps": batch.accumulation_steps,
        "steps": batch.steps,
        "tokens_per_step": config.train.batch_tokens,
        "total_tokens": batch.total_tokens,
    }
    parameters = plan["parameters"]
    assert (parameters["total"], parameters["active"]) == (counts.total, counts.active)
    assert sum(part["total"] for part in parameters["parts"].values()) == counts.total
    assert sum(part["active"] for part in parameters["parts"].values()) == counts.active
    assert parameters["per_device"] == {"shared": held.shared, "experts": held.experts, "total": held.total}
    causal = flops.causal_training
    assert plan["flops_per_token"] == {"forward": flops.forward, "training": flops.training, "causal_training": causal}
    for axis, groups in plan["groups"].items():
        assert groups["size"] * groups["count"] == topology.world_size, axis
    for place, entry in enumerate(plan["experts_of_first_node"]):
        assert entry["rank"] == place
        assert entry["first"] // (entry["last"] + 1 - entry["first"]) == topology.coordinate("expert", place)
        assert entry["slice"] == topology.coordinate("expert_tensor", place)
    assert len(plan["experts_of_first_node"]) == (topology.devices_per_node if config.moe else 0)


@pytest.mark.parametrize("nodes", [256, 2048])
def test_thousands_of_ranks_are_quick(nodes: int) -> None:
    config = big(nodes)
    start = time.process_time()
    plan = Plan.from_config(config)
    text = plan.text()
    json.dumps(plan.json())
    assert time.process_time() - start < 0.2
    assert f"world size {8 * nodes} ({nodes:,} nodes x 8 devices)" in text
    assert "tokens travel among the 128 ranks of an exchange group, over 16 nodes (hierarchical)" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_within_a_second_and_without_torch(name: str) -> None:
    """CPU seconds of the whole process: what it takes on a machine that does nothing else."""
    code = (
        "import sys, time; from dsmoe.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)), time.process_time()); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "plan", str(CONFIGS / f"{name}.yaml"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, encoding="utf-8")
    body, _, last = result.stdout.rstrip().rpartition("\n")
    assert json.loads(body)["name"] == name
    imported, seconds = last.rsplit(" ", 1)
    assert imported == "[]"
    assert float(seconds) < 1
