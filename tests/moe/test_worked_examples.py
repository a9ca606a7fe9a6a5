"""The worked examples in the docstrings of dsmoe/moe: the code gives the numbers that they show."""

from __future__ import annotations

import pytest
import torch

from dsmoe.moe.balance import count_experts
from dsmoe.moe.capacity import DROP_POLICIES, Assignments, by_chunk, limit, spread_over_slices
from dsmoe.moe.dispatch import _regroup, _slots
from dsmoe.moe.hierarchical import _count, _Hop, _pack, _unpack
from dsmoe.moe.permutation import RowMap
from dsmoe.moe.replay import _GOLDEN, Draws, _GoingBackward, _mix, uniform
from dsmoe.moe.router import Routing, _sortable
from dsmoe.parallel.collectives import Exchange, Traffic
from dsmoe.parallel.groups import ExpertGroup


def assignments(experts: list[list[int]], num_experts: int, capacity: int | None = None) -> Assignments:
    experts_TK = torch.tensor(experts)
    nothing = torch.zeros(0)
    routing = Routing(nothing, nothing, nothing, torch.ones(experts_TK.shape), experts_TK, None)
    return limit(routing, count_experts(experts_TK, num_experts), capacity, DROP_POLICIES["position"])


def test_rows_sorted_by_expert() -> None:
    kept = assignments([[0, 1], [0, 2], [1, 3], [2, 3]], 4, capacity=1)
    row_map = RowMap.from_assignments(kept, kept.kept_E.cumsum(0) - kept.kept_E, 5)
    assert row_map.row_UK.tolist() == [[0, 1], [5, 2], [5, 3], [5, 5]]
    assert row_map.assignment_N.tolist() == [0, 1, 3, 5, 8]
    assert row_map.bags is not None
    assert [each.tolist() for each in row_map.bags] == [[0, 1, 2, 3, 0], [0, 2, 3, 4, 4]]
    assert row_map.gather(torch.arange(1.0, 5)[:, None])[:, 0].tolist() == [1, 1, 2, 3, 0]
    assert row_map.sum(torch.arange(1.0, 6)[:, None])[:, 0].tolist() == [3, 3, 4, 0]


def test_padded_chunks() -> None:
    row_map = _slots(assignments([[0], [0], [0], [1], [1], [1]], 2), capacity=3, num_chunks=2)
    assert row_map.row_UK[:, 0].tolist() == [0, 2, 3, 1, 4, 5]


def test_regrouping_received_rows() -> None:
    row_map = _regroup(torch.tensor([[1, 2], [2, 1]]), 6)
    assert row_map.row_UK[:, 0].tolist() == [0, 3, 4, 1, 2, 5]
    received = ["a0", "a1", "a1", "b0", "b0", "b1"]
    assert [received[source] for source in row_map.assignment_N.tolist()] == ["a0", "b0", "b0", "a1", "a1", "b1"]


def hop(rows: int, choices: int) -> _Hop:
    return _Hop.from_counts(ExpertGroup.alone(), Traffic(), [[rows], [rows], [choices], [choices]])


def test_packing_for_two_nodes() -> None:
    packed = _pack(torch.tensor([[0, 1], [2, 3], [1, 2], [3, 4]]), 4, 2, [hop(5, 7)])
    assert packed.code_M.tolist() == [1, 2, 3, 1, 2, 1, 3]
    assert packed.rows.sources().tolist() == [0, 2, 1, 2, 3]
    assert packed.choices.sources().tolist() == [0, 0, 2, 1, 1, 2, 3]


def test_unpacking_on_the_second_node() -> None:
    weights, experts = _unpack(torch.tensor([1, 2, 1, 3]), torch.arange(1.0, 5), 3, 2, 2)
    assert experts.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert weights.tolist() == [[1, 2], [3, 0], [4, 0]]


def test_counts_announced_for_two_nodes() -> None:
    assert _count(torch.tensor([[0, 1], [1, 1]]), 1, 2, 2).tolist() == [[[2, 1, 2, 1, 3], [0, 0, 0, 0, 0]]]


def test_sorting_by_expert() -> None:
    kept = assignments([[1, 0], [1, 2], [0, 1], [3, 1]], 4, capacity=3)
    assert kept.order_A.tolist() == [1, 4, 0, 2, 5, 7, 3, 6]
    assert kept.expert_A.tolist() == [0, 0, 1, 1, 1, 1, 2, 3]
    assert kept.place_A.tolist() == [0, 1, 0, 1, 2, 3, 0, 0]
    assert kept.kept_A.tolist() == [True, True, True, True, True, False, True, True]
    assert kept.kept_E.tolist() == [2, 3, 1, 1]


def test_chunks_of_tokens() -> None:
    assert by_chunk(torch.tensor([[0], [1], [2], [1]]), 2, 2).tolist() == [[0], [1], [4], [3]]


def test_slices_of_experts() -> None:
    spread = spread_over_slices(Assignments.all_kept(torch.tensor([[2], [0]]), 4), 2, 2)
    chosen = torch.empty_like(spread.expert_A).scatter_(0, spread.order_A, spread.expert_A)
    assert chosen.view(2, 2).tolist() == [[4, 6], [0, 2]]


def test_keys_in_the_order_of_the_numbers() -> None:
    keys = _sortable(torch.tensor([[1.0, -2.0, 1.0]]))
    assert keys.tolist() == [[3196059648, -3221225476, 3196059646]]
    assert keys.topk(2).indices.tolist() == [[0, 2]]


@pytest.mark.parametrize(("fingerprint", "node", "number"), [(-1.2, 5, 1), (0.3, 15, 0), (0.3, 35, 2)])
def test_the_pass_that_is_repeated(fingerprint: float, node: int, number: int) -> None:
    draws = Draws()
    for index, (value, start) in enumerate([(0.3, 10), (-1.2, 20), (0.3, 30)]):
        draws._note(torch.full((4,), value), start + 1, start, index, -1)
    match = draws._match(torch.full((4,), fingerprint + 1e-6), _GoingBackward(task=0, node=node, is_checkpoint=False))
    assert match is not None
    assert int(match[1]) == number


def test_numbers_of_a_key() -> None:
    key = torch.zeros((), dtype=torch.int64)
    assert int(_mix(key + _GOLDEN)) == 0xE220A8397B1DCDAF - 2**64
    numbers = uniform(key, (2,), torch.device("cpu")).double() * 2**23 - 0.5
    assert numbers.tolist() == pytest.approx([4034278, 7409748], abs=0.6)


def test_exchange_in_the_examples_is_not_padded() -> None:
    assert hop(5, 7).rows == Exchange(ExpertGroup.alone(), Traffic(), [5], [5])
