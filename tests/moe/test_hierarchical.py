"""Across nodes first, then inside: the same numbers as one rank, and on the slow link no byte more than it takes."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import pytest
import torch

from dsmoe.moe.hierarchical import HierarchicalDispatch
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.moe.test_parallel import cases, check_case
from tests.moe.test_static import no_host_reads

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


def choose_at_random(topology: Topology, tokens: int, chunks: int) -> dict[str, Any]:
    """Experts chosen by each token, uniformly among all sets of K, and bytes over (intra, inter) in both passes."""
    groups = Groups(topology)
    options = {"capacity_factor": None, "expert_ffn_size": 8, "seed": 0, "overlap_chunks": chunks}
    layer = moe_layer(D, num_experts=D, ep_size=topology.expert, k=4, **options)
    layer.set_expert_group(groups.expert_group())
    torch.nn.init.eye_(layer.router.weight)
    torch.manual_seed(groups.rank)
    x = torch.randn(tokens - 3 * groups.rank, D, requires_grad=True)
    output, _, _ = layer(x)
    forward = layer.take_traffic()
    output.sum().backward()
    return {"experts": layer.router(x).experts_TK, "forward": forward, "backward": layer.take_traffic()}


@pytest.mark.parametrize(("nodes", "devices", "chunks"), [(2, 2, 1), (2, 2, 3), (4, 1, 2)])
def test_across_nodes_travels_one_row_per_token_and_node(nodes: int, devices: int, chunks: int) -> None:
    """Out and home one row for each; with each choice a weight and a code of 4 bytes; back the weight's gradient."""
    ranks, row_bytes = nodes * devices, D * 4
    topology = Topology(nodes, devices, expert=ranks, all_to_all="hierarchical")
    results = run_ranks(ranks, choose_at_random, topology, 200, chunks)
    choices = [
        [result["experts"] * nodes // D == node for node in range(nodes)]  # [T, K] each
        for result in results
    ]
    for rank, result in enumerate(results):
        here, place = divmod(rank, devices)
        peers = [node for node in range(nodes) if node != here]
        rows_out = sum(int(choices[rank][node].any(-1).sum()) for node in peers)
        choices_out = sum(int(choices[rank][node].sum()) for node in peers)
        rows_in = sum(int(choices[node * devices + place][here].any(-1).sum()) for node in peers)
        choices_in = sum(int(choices[node * devices + place][here].sum()) for node in peers)
        assert result["forward"][1] == (rows_out + rows_in) * row_bytes + choices_out * 8
        assert result["backward"][1] == (rows_out + rows_in) * row_bytes + choices_in * 4


@pytest.mark.parametrize(("nodes", "times_less"), [(2, 2.080), (4, 1.374)])
def test_rows_across_nodes_are_as_many_as_expected(nodes: int, times_less: float) -> None:
    """A token visits d = N (1 - C(E - E / N, K) / C(E, K)) nodes: d (N - 1) / N rows instead of K (N - 1) / N."""
    num_experts, top_k = D, 4
    visited = nodes * (1 - comb(num_experts - num_experts // nodes, top_k) / comb(num_experts, top_k))
    topology = Topology(nodes, 1, expert=nodes, all_to_all="hierarchical")
    results = run_ranks(nodes, choose_at_random, topology, 2000, 1)
    tokens = sum(len(result["experts"]) for result in results)
    bytes_of_choices = sum(4 * int((r["experts"] * nodes // D != rank).sum()) for rank, r in enumerate(results))
    bytes_of_rows = sum(result["backward"][1] for result in results) - bytes_of_choices
    assert bytes_of_rows / (2 * D * 4 * tokens) == pytest.approx(visited * (nodes - 1) / nodes, rel=0.02)
    assert top_k / visited == pytest.approx(times_less, rel=1e-3)


def count_host_reads(topology: Topology, chunks: int) -> int:
    layer = moe_layer(D, num_experts=8, ep_size=topology.expert, k=2, expert_ffn_size=8, seed=0, overlap_chunks=chunks)
    layer.set_expert_group(Groups(topology).expert_group())
    reads, tolist = [], torch.Tensor.tolist
    with no_host_reads(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
        layer(torch.randn(12, D, requires_grad=True))[0].sum().backward()
    return len(reads)


@pytest.mark.parametrize("chunks", [1, 3])
def test_both_levels_and_all_chunks_read_once_on_the_host(chunks: int) -> None:
    assert run_ranks(4, count_host_reads, Topology(2, 2, expert=4, all_to_all="hierarchical"), chunks) == [1] * 4
