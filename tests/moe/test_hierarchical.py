"""Across nodes first, then inside: the same numbers as one rank, and on the slow link no byte more than it takes."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dsmoe
from dsmoe.moe.hierarchical import HierarchicalDispatch
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from tests.moe.test_parallel import Case, cases, check_case
from tests.ranks import run_ranks

D = 16


def check_cases(topology: Topology, experts: int, chunks: int, every: int) -> set[str]:
    """The dispatches that were used, by every `every`-th case."""
    groups = Groups(topology)
    kinds = set()
    for case in cases(topology.world_size)[::every]:
        case = replace(case, experts=experts, more={**case.more, "overlap_chunks": chunks})
        layer = case.layer(topology.expert)
        layer.set_expert_group(groups.expert_group())
        check_case(case, layer, groups)
        kinds.add(type(layer._exchange(case.factor)).__name__)
    return kinds


@pytest.mark.parametrize(
    ("nodes", "devices", "expert", "experts", "chunks", "every"),
    [
        (2, 2, 4, 8, 1, 1),
        (2, 2, 4, 4, 3, 2),
        (4, 1, 4, 8, 2, 3),
        (4, 1, 2, 4, 1, 3),  # two copies of the experts
        (4, 2, 8, 8, 1, 5),
    ],
)
def test_two_levels_equal_one_rank(
    nodes: int, devices: int, expert: int, experts: int, chunks: int, every: int
) -> None:
    topology = Topology(nodes, devices, expert=expert, all_to_all="hierarchical")
    results = run_ranks(nodes * devices, check_cases, topology, experts, chunks, every)
    assert results == [{HierarchicalDispatch.__name__}] * (nodes * devices)


def test_within_a_node_it_is_flat() -> None:
    topology = Topology(2, 2, expert=2, all_to_all="hierarchical")
    assert run_ranks(4, check_cases, topology, 4, 1, 9) == [{"VariableDispatch", "PaddedDispatch"}] * 4
