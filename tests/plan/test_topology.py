"""Every group of every small topology, against nested loops; the arithmetic at 16,384 ranks; the errors."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from dsmoe.config.errors import UserError
from dsmoe.plan import AXES, Axis, Topology
from tests.helpers.plan_configs import make_config

Groups = tuple[tuple[int, ...], ...]
WORLDS = range(1, 65)


@cache
def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def topologies(world: int) -> Iterator[Topology]:
    """Every valid topology of `world` ranks."""
    for devices_per_node, tensor, expert_tensor in itertools.product(divisors(world), repeat=3):
        for expert in divisors(world // expert_tensor):
            yield Topology(world // devices_per_node, devices_per_node, tensor, expert, expert_tensor)


def grid_groups(sizes: dict[Axis, int]) -> dict[Axis, Groups]:
    """Give the cells of a grid their ranks in nested loops, first axis fastest; return its lines along every axis."""
    ranks: dict[tuple[int, ...], int] = {}
    for place in itertools.product(*(range(size) for size in reversed(sizes.values()))):  # the last range runs fastest
        ranks[place[::-1]] = len(ranks)
    lines: dict[Axis, Groups] = {}
    for position, axis in enumerate(sizes):
        by_other_places: dict[tuple[int, ...], list[int]] = {}
        for place, rank in ranks.items():
            by_other_places.setdefault(place[:position] + place[position + 1 :], []).append(rank)
        lines[axis] = tuple(sorted(tuple(sorted(line)) for line in by_other_places.values()))
    return lines


@cache
def brute_force(world: int, tensor: int, expert: int, expert_tensor: int) -> dict[Axis, Groups]:
    experts = expert * expert_tensor
    return {
        **grid_groups({"tensor": tensor, "data": world // tensor}),
        **grid_groups({"expert_tensor": expert_tensor, "expert": expert, "expert_data": world // experts}),
        **grid_groups({"exchange": experts, "expert_data": world // experts}),
    }


@pytest.mark.parametrize("world", WORLDS)
def test_groups_equal_nested_loops(world: int) -> None:
    for topology in topologies(world):
        expected = brute_force(world, topology.tensor, topology.expert, topology.expert_tensor)
        assert topology.world_size == world
        for axis in AXES:
            assert topology.groups(axis) == expected[axis], (topology, axis)
    brute_force.cache_clear()


@pytest.mark.parametrize("world", WORLDS)
def test_nodes_spanned_equals_looking_at_every_group(world: int) -> None:
    for topology in topologies(world):
        for axis in AXES:
            nodes = [{rank // topology.devices_per_node for rank in group} for group in topology.groups(axis)]
            assert topology.nodes_spanned(axis) == max(len(on) for on in nodes), (topology, axis)


@pytest.mark.parametrize("world", WORLDS)
def test_groups_partition_the_ranks_and_agree_with_group_of(world: int) -> None:
    for topology in topologies(world):
        if topology.nodes > 1:
            continue  # groups do not depend on the nodes, as the comparison with nested loops shows
        for axis in AXES:
            groups = topology.groups(axis)
            assert sorted(itertools.chain(*groups)) == list(range(world))
            assert {len(group) for group in groups} == {topology.degree(axis)}
            for group in groups:
                for place, rank in enumerate(group):
                    assert topology.group_of(axis, rank) == group
                    assert topology.coordinate(axis, rank) == place


@pytest.mark.parametrize("world", WORLDS)
def test_axes_of_a_grid_are_orthogonal(world: int) -> None:
    for topology in topologies(world):
        if topology.nodes > 1:
            continue
        for grid in (("tensor", "data"), ("expert_tensor", "expert", "expert_data")):
            places = {tuple(topology.coordinate(axis, rank) for axis in grid) for rank in range(world)}
            sizes = [topology.degree(axis) for axis in grid]
            # every combination of places is one rank: a group of each axis meets the others' in exactly that one
            assert places == set(itertools.product(*(range(size) for size in sizes)))
        for one, other in itertools.product(topology.groups("tensor"), topology.groups("data")):
            assert len(set(one) & set(other)) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_experts_lie_on_consecutive_ranks_inside_a_node_where_they_fit(world: int) -> None:
    for topology in topologies(world):
        run = topology.expert * topology.expert_tensor
        for start in range(0, world, run):
            ranks = {
                rank for offset in range(topology.expert_tensor) for rank in topology.group_of("expert", start + offset)
            }
            assert ranks == set(range(start, start + run))
        if topology.devices_per_node % run == 0:
            assert topology.nodes_spanned("exchange") == 1


@pytest.mark.parametrize("world", WORLDS)
def test_the_nodes_take_their_ranks_in_turn(world: int) -> None:
    for devices_per_node in divisors(world):
        topology = Topology(world // devices_per_node, devices_per_node)
        nodes = [node for node in range(topology.nodes) for _ in range(devices_per_node)]
        assert [topology.node_of(rank) for rank in range(world)] == nodes


def test_deepspeed_example() -> None:
    """The layout in the docstring of `deepspeed.utils.groups._create_expert_and_data_parallel`: 16 ranks, ep 2."""
    topology = Topology(nodes=2, devices_per_node=8, expert=2)
    assert topology.groups("expert") == tuple((first, first + 1) for first in range(0, 16, 2))
    assert topology.groups("expert_data") == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    assert topology.groups("data") == (tuple(range(16)),)


def test_experts_are_laid_over_tensor_ranks() -> None:
    """Parallel folding: the expert degree may exceed the data degree."""
    topology = Topology(nodes=1, devices_per_node=8, tensor=4, expert=8)
    assert (topology.data, topology.expert_data) == (2, 1)
    assert topology.groups("tensor") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topology.groups("data") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topology.groups("expert") == (tuple(range(8)),)


def test_sixteen_thousand_ranks() -> None:
    topology = Topology(nodes=2048, devices_per_node=8, tensor=4, expert=64, expert_tensor=2)
    assert topology.world_size == 16_384
    for axis in AXES:
        groups = topology.groups(axis)
        assert len(groups) * topology.degree(axis) == topology.world_size
        assert groups[-1] == topology.group_of(axis, 16_383)
        for rank in range(topology.world_size):
            assert topology.coordinate(axis, rank) < topology.degree(axis)
    assert topology.nodes_spanned("expert") == 16
    assert topology.nodes_spanned("expert_data") == 128
    assert topology.nodes_spanned("tensor") == 1
    assert topology.group_of("expert", 16_383) == tuple(range(16_384 - 127, 16_384, 2))


def test_from_config_reads_cluster_and_parallel() -> None:
    config = make_config(
        cluster={"nodes": 4, "devices_per_node": 6},
        parallel={"tensor": 2, "expert": 3, "expert_tensor": 4, "all_to_all": "hierarchical"},
    )
    expected = Topology(4, 6, tensor=2, expert=3, expert_tensor=4, all_to_all="hierarchical")
    assert Topology.from_config(config) == expected


@pytest.mark.parametrize("world", range(1, 25))
def test_levels_are_the_equal_places_of_a_copys_nodes_and_the_nodes(world: int) -> None:
    """From a table of every rank's (copy, node, place); refused exactly where nodes have unequal parts of a copy."""
    for flat in topologies(world):
        assert flat.exchange_levels() is None
        copy, per_node = flat.expert * flat.expert_tensor, flat.devices_per_node
        if copy % per_node and per_node % copy:
            with pytest.raises(UserError, match=r"parallel.all_to_all \(hierarchical\) wants"):
                replace(flat, all_to_all="hierarchical")
            continue
        levels = replace(flat, all_to_all="hierarchical").exchange_levels()
        if flat.nodes_spanned("exchange") == 1:
            assert levels is None
            continue
        place_of = {rank: (rank // copy, rank // per_node, rank % per_node) for rank in range(world)}
        across, inside = defaultdict(list), defaultdict(list)
        for rank, (of_copy, node, place) in place_of.items():
            across[of_copy, place].append(rank)
            inside[of_copy, node].append(rank)
        assert levels == tuple(tuple(map(tuple, groups.values())) for groups in (across, inside))


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"tensor": 3},
            "parallel.tensor (3) must divide the number of devices (2 nodes x 8 = 16); nearest: 2 or 4",
        ),
        (
            {"expert": 64},
            "parallel.expert * parallel.expert_tensor (64 * 1 = 64) must divide the number of devices "
            "(2 nodes x 8 = 16); nearest parallel.expert: 16",
        ),
        (
            {"expert": 6, "expert_tensor": 2},
            "parallel.expert * parallel.expert_tensor (6 * 2 = 12) must divide the number of devices "
            "(2 nodes x 8 = 16); nearest parallel.expert: 4 or 8",
        ),
        (
            {"expert_tensor": 5},
            "parallel.expert * parallel.expert_tensor (1 * 5 = 5) must divide the number of devices "
            "(2 nodes x 8 = 16); nearest parallel.expert_tensor: 4 or 8",
        ),
        ({"tensor": 0}, "Parallel: tensor (0): Input should be greater than or equal to 1"),
        ({"all_to_all": "hier"}, "Parallel: all_to_all ('hier'): Input should be 'flat' or 'hierarchical'"),
    ],
)
def test_what_cannot_be_laid_out_is_named_with_its_remedy(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Topology(nodes=2, devices_per_node=8, **degrees)
    assert str(caught.value) == message


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Topology(nodes=2, devices_per_node=8, tensor=3, expert=5)
    assert "parallel.tensor (3)" in str(caught.value)
    assert "parallel.expert * parallel.expert_tensor (5 * 1 = 5)" in str(caught.value)


@pytest.mark.parametrize("rank", [-1, 16])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    topology = Topology(nodes=2, devices_per_node=8)
    for ask in (topology.node_of, lambda r: topology.group_of("data", r)):
        with pytest.raises(IndexError, match=f"rank {rank} is not among the 16 ranks"):
            ask(rank)
