"""The crossings between replicated, sequence-cut and weight-cut parts of a model, and their gradients, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dsmoe.parallel import Groups, TensorGroup
from dsmoe.parallel import mappings as r
from dsmoe.parallel.sharding import Shard
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks

Crossing = Callable[[torch.Tensor, TensorGroup], torch.Tensor]
B, S, D = 2, 4, 3


def values(rank: int, length: int) -> torch.Tensor:
    """Different on every rank and in every place."""
    return torch.arange(float(B * length * D)).view(B, length, D) + 1000 * rank


def crossed(crossing: Crossing, group: TensorGroup, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes over, and the gradient that comes back for one that differs between ranks and places."""
    x = values(group.rank, length).requires_grad_()
    y = crossing(x, group)
    y.backward(values(group.rank, y.shape[1]) * 10)
    return y.detach(), x.grad


def cut(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return whole[:, rank * S // 2 : (rank + 1) * S // 2]


def check_crossings() -> None:
    rank = dist.get_rank()
    group = Groups(Topology(1, 2, tensor=2)).tensor_group()
    cut_group = replace(group, sequence=True)
    full, half = [values(i, S) for i in range(2)], [values(i, S // 2) for i in range(2)]
    joined = torch.cat(half, dim=1)
    total = full[0] + full[1]

    def check(crossing: Crossing, group: TensorGroup, length: int, output: torch.Tensor, grad: torch.Tensor) -> None:
        y, gradient = crossed(crossing, group, length)
        assert torch.equal(y, output), crossing
        assert torch.equal(gradient, 10 * grad), crossing

    check(r.enter_tensor_parallel_region, group, S, full[rank], total)
    check(r.leave_tensor_parallel_region, group, S, total, full[rank])
    check(r.enter_tensor_parallel_region, cut_group, S // 2, joined, cut(total, rank))
    check(r.leave_tensor_parallel_region, cut_group, S, cut(total, rank), joined)
    check(r.enter_sequence_parallel_region, group, S, cut(full[rank], rank), joined)
    check(r.leave_sequence_parallel_region, group, S // 2, joined, cut(full[rank], rank))
    check(r.enter_sequence_parallel_region, cut_group, S // 2, half[rank], half[rank])
    check(r.leave_sequence_parallel_region, cut_group, S // 2, half[rank], half[rank])
    check(r.reduce_from_tensor_parallel_region, group, S, total, full[rank])
    check(r.copy_weight_to_tensor_parallel_region, group, S, full[rank], total)
    own = full[rank].requires_grad_()
    columns = r.gather_from_tensor_parallel_region(own, cut_group)
    columns.backward(torch.arange(2.0 * D).expand_as(columns))
    assert torch.equal(columns, torch.cat(full, dim=2))
    assert torch.equal(own.grad, (torch.arange(float(D)) + rank * D).expand_as(own))

    rows = torch.arange(2.0 * D).view(2, D) + rank  # of flat tokens, as an MoE layer has them
    assert torch.equal(r.all_gather(rows, group), torch.cat([rows - rank, rows - rank + 1]))


def test_crossings_and_their_gradients() -> None:
    run_ranks(2, check_crossings)


def bf16_gradients() -> float:
    """256 + 1 + 1 + 1: in bf16, 256 + 1 is 256."""
    group = Groups(Topology(1, 4, tensor=4)).tensor_group()
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    used = r.copy_weight_to_tensor_parallel_region(weight, group)
    used.backward(torch.tensor([256.0 if group.rank == 0 else 4.0 / 3.0]).bfloat16())
    return float(weight.grad)


def test_gradients_of_shared_weights_are_summed_in_fp32() -> None:
    assert run_ranks(4, bf16_gradients) == [260.0] * 4


def test_one_rank_alone_crosses_nothing() -> None:
    x = torch.randn(B, S, D)
    for crossing in (
        r.enter_tensor_parallel_region,
        r.leave_tensor_parallel_region,
        r.enter_sequence_parallel_region,
        r.leave_sequence_parallel_region,
        r.gather_from_tensor_parallel_region,
        r.copy_weight_to_tensor_parallel_region,
    ):
        assert crossing(x, TensorGroup.alone()) is x


@pytest.mark.parametrize(("dim", "parts"), [(0, 1), (0, 2), (1, 1)])
def test_shards_make_up_the_whole(dim: int, parts: int) -> None:
    whole = torch.arange(48.0).view(8, 6)
    again = torch.zeros_like(whole)
    for index in range(2):
        shard = Shard(dim, index, 2, parts)
        part = shard.slice_of(whole)
        assert shard.whole_shape(part.shape) == list(whole.shape)
        shard.put(part, again)
    assert torch.equal(again, whole)


def test_each_of_two_stacked_matrices_is_cut() -> None:
    gate_up = torch.arange(8.0)[:, None]
    assert Shard(0, 1, 2, parts=2).slice_of(gate_up)[:, 0].tolist() == [2, 3, 6, 7]
