"""All that is wrong at a start is said together, and what is advised then passes every check."""

from __future__ import annotations

import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from dsmoe.config import load_config
from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.errors import ConfigError, Problem
from dsmoe.config.schema import Config
from dsmoe.plan.devices import device_problems
from dsmoe.plan.topology import Topology
from dsmoe.runtime import world as worlds
from dsmoe.runtime.start import begin, pretrain_parser
from dsmoe.runtime.world import World, world_problems

TINY = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
ADVICE = re.compile(r"train on what was started with ([\w.]+=[^\s,]+(?: [\w.]+=[^\s,]+)*)(, or cluster\.elastic=true)?")


def problems(monkeypatch: pytest.MonkeyPatch, world: World, *overrides: str) -> list[str]:
    """The errors of a start by `world`, line by line."""
    monkeypatch.setattr(worlds, "launched_world", lambda: world)
    try:
        load_config(TINY, overrides, world_problems, device_problems)
    except ConfigError as error:
        return error.problems
    return []


def test_config_layout_batch_device_and_world_are_wrong_and_all_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    wrong = {
        "parallel.expert=3": "parallel.expert (3) must divide moe.num_experts (8)",
        "train.batch_tokens=5000": "train.batch_tokens (5000) must be a multiple of data ranks",
        "optimizer.min_lr=1": "optimizer.min_lr (1) must be at most optimizer.lr",
        "cluster.device=h1000": "cluster.device ('h1000') is not a known device",
        "cluster.nodes=2": "python alone started 1 x 1 = 1 rank, but cluster.nodes x cluster.devices_per_node is 2 x 2",
    }
    start = begin(pretrain_parser(), ["--config", str(TINY), *wrong])
    assert start.ended() == 2
    said = capsys.readouterr().err
    for message in wrong.values():
        assert message in said
    left = (
        "it takes cluster.nodes=1 cluster.devices_per_node=1 parallel.expert=1, and this has to change as well: "
        "train.batch_tokens (5000) must be a multiple of data ranks * train.micro_batch_size * train.sequence_length "
        "(1 * 8 * 256 = 2048); nearest: 4096 or 6144 ("
    )
    assert left in said
    start = begin(pretrain_parser(), ["--config", str(TINY), "cluster.nodes=2", "optimizer.lrr=1"])
    assert start.ended() == 2  # what is said of a config with a key that nobody knows
    said = capsys.readouterr().err
    assert "optimizer.lrr: unknown key" in said
    assert "python alone started 1 x 1 = 1 rank" in said


def test_a_degree_that_the_world_cannot_have_is_part_of_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(monkeypatch, World(1, 1, "python alone"))
    assert (
        "or train on what was started with cluster.nodes=1 cluster.devices_per_node=1 parallel.expert=1, or "
        "cluster.elastic=true (" in problem
    )
    (problem,) = problems(monkeypatch, World(3, 3, "torchrun"))
    assert (
        "What was started cannot train this config: it takes cluster.nodes=1 cluster.devices_per_node=3 "
        "parallel.expert=1, and this has to change as well: train.batch_tokens (4096) must be a multiple of data ranks"
    ) in problem
    assert "train on what was started" not in problem


def draw(choose: random.Random) -> list[str]:
    """The overrides of a config that may or may not suit its own devices."""
    parallel = {
        "tensor": choose.choice([1, 1, 1, 2, 4, 3]),
        "expert": choose.choice([1, 2, 4, 8, 3, 6]),
        "expert_tensor": choose.choice([1, 1, 1, 2]),
        "all_to_all": choose.choice(["flat", "flat", "hierarchical"]),
    }
    size = choose.choice([1, 2, 3, 4, 8])
    train = {"micro_batch_size": size, "batch_tokens": 256 * choose.choice([size * 8, size * 24, 96, 1, 7, 64])}
    cluster = {"nodes": choose.choice([1, 2, 3, 4]), "devices_per_node": choose.choice([1, 2, 4, 6, 8])}
    sections = {"parallel": parallel, "train": train, "cluster": cluster}
    overrides = [f"{name}.{key}={value}" for name, section in sections.items() for key, value in section.items()]
    overrides += choose.choice([[], [], [], ["moe.num_experts=6"], ["optimizer.min_lr=1"], ["cluster.elastic=true"]])
    return overrides


def is_valid(overrides: list[str], choice: list[str]) -> bool:
    try:
        load_config(TINY, [*overrides, *choice])
    except ConfigError as error:
        return all("optimizer.min_lr" in problem for problem in error.problems)
    return True


def any_choice(overrides: list[str], nodes: int, devices: int) -> bool:
    """Return whether any degree and micro-batch is valid on these devices, by trying all."""
    given: list[Config] = []

    def look(config: Config) -> list[Problem]:
        given.append(config)
        return []

    with suppress(ConfigError):
        load_config(TINY, overrides, look)
    (config,) = given
    case = config.cluster.model_copy(update={"nodes": nodes, "devices_per_node": devices})
    for expert in range(1, 9):
        parallel = config.parallel.model_copy(update={"expert": expert, "all_to_all": "flat"})
        for size in range(1, config.train.micro_batch_size + 1):
            train = config.train.model_copy(update={"micro_batch_size": size})
            choice = config.model_copy(update={"cluster": case, "parallel": parallel, "train": train})
            if all(key == "optimizer.min_lr" for key, _ in cross_field_problems(choice)):
                return True
    return False


def run_draws(monkeypatch: pytest.MonkeyPatch, rounds: int, seed: int) -> Counter[str]:
    """Draw configs and worlds, follow the advice, and count what came of it."""
    choose, counts = random.Random(seed), Counter[str]()
    for number in range(rounds):
        overrides, local = draw(choose), choose.choice([1, 2, 3, 4, 8])
        world = World(local * choose.choice([1, 1, 2, 3]), local, "torchrun")
        said = problems(monkeypatch, world, *overrides)
        case = f"round {number}: {world} {overrides}: {said}"
        of_world = [problem for problem in said if "torchrun started" in problem]
        nodes = world.size // local
        on_world = [f"cluster.nodes={nodes}", f"cluster.devices_per_node={local}"]
        if not of_world:
            counts["elastic" if "cluster.elastic=true" in overrides else "the config's own devices"] += 1
            continue
        (problem,) = of_world
        advice = ADVICE.search(problem)
        if advice is None:
            assert "What was started cannot train this config: " in problem, case
            assert not any_choice(overrides, nodes, local), case
            settings = re.search(r"it takes ([\w.]+=[^\s,]+(?: [\w.]+=[^\s,]+)*), and", problem)
            batch = re.search(r"train.batch_tokens \(.*; nearest: (\d+)", problem)
            assert settings is not None, case
            if batch is not None and "to change as well: train.batch_tokens" in problem:
                assert is_valid(overrides, [*settings[1].split(), f"train.batch_tokens={batch[1]}"]), case
                counts["another batch advised"] += 1
            counts["nothing can be advised"] += 1
            continue
        settings = advice[1].split()
        assert settings[:2] == on_world, case
        assert is_valid(overrides, settings), case
        assert not [p for p in problems(monkeypatch, world, *overrides, *settings) if "started" in p], case
        counts["advised"] += 1
        if advice[2]:
            after = problems(monkeypatch, world, *overrides, "cluster.elastic=true")
            assert not [p for p in after if "min_lr" not in p], case
            counts["elastic advised"] += 1
        if "optimizer.min_lr=1" not in overrides:
            Topology.from_config(load_config(TINY, [*overrides, *settings]))
    return counts


@pytest.mark.parametrize(
    ("rounds", "seed"), [(60, 1), pytest.param(5000, 2, marks=(pytest.mark.fuzz, pytest.mark.timeout(1800)))]
)
def test_advice_passes_the_checks(rounds: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = run_draws(monkeypatch, rounds, seed)
    print(counts)
    assert min(counts["advised"], counts["elastic advised"], counts["nothing can be advised"]) > rounds // 20
