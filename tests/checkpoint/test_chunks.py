"""Ranges of flattened tensors as boxes, boxes that tile a tensor, chunks of a rank and their writers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe.checkpoint.manifest import tiles
from dsmoe.checkpoint.state import assign_writers, chunks_of_range
from dsmoe.parallel.sharding import Box, Shard, ShardedTensor, boxes_of_range

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
def test_boxes_of_a_range_are_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbered = torch.arange(size).view(shape)
    boxes = list(boxes_of_range(shape, start, stop))
    assert [number for box in boxes for number in box.view(numbered).flatten().tolist()] == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(shape=SHAPES, cuts=st.lists(st.floats(0, 1), max_size=4))
def test_ranges_that_follow_one_another_tile_the_tensor(shape: tuple[int, ...], cuts: list[float]) -> None:
    size = math.prod(shape)
    ends = [0, *sorted(int(cut * size) for cut in cuts), size]
    boxes = [b for first, last in itertools.pairwise(ends) for b in boxes_of_range(shape, first, last)]
    stored = [(box.start, box.shape) for box in boxes]
    assert tiles(shape, stored)
    assert not tiles(shape, stored[1:])
    assert not tiles(shape, [*stored[1:], stored[-1]]) or len(stored) == 1


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 2)), ((1, 2), (2, 2)), ((2, 0), (2, 2)), ((0, 2), (1, 2)), ((2, 1), (1, 2))],
        [((0, 0), (4, 2)), ((0, 1), (4, 2))],
        [((0, 0), (4, 5))],
        [((0,), (16,))],
        [((-1, 0), (4, 4))],
    ],
)
def test_overlaps_and_gaps_are_not_tilings(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert not tiles((4, 4), boxes)


@given(first=st.integers(0, 24), last=st.integers(0, 24))
def test_chunks_of_a_range_are_elements_of_the_global_tensor(first: int, last: int) -> None:
    """A range of the flattened slice that a rank has of two stacked matrices (gate and up)."""
    start, stop = min(first, last), max(first, last)
    shard = Shard(dim=0, index=1, count=2, parts=2)
    whole = torch.arange(8 * 6).view(8, 6)
    local = shard.slice_of(whole)
    sharded = ShardedTensor.sliced("w", local, shard)
    flat = local.reshape(-1)[start:stop]
    values = {"model": flat, "exp_avg": -flat}
    found = [chunk for chunk, _ in chunks_of_range(sharded, tuple(local.shape), start, values)]
    moments = [moment for _, moment in chunks_of_range(sharded, tuple(local.shape), start, values)]
    assert [(m.key, m.box) for m in moments] == [("exp_avg/w", chunk.box) for chunk in found]
    assert all(torch.equal(m.values, -chunk.values) for m, chunk in zip(moments, found, strict=True))
    assert sum(chunk.box.size for chunk in found) == stop - start
    for chunk in found:
        assert (chunk.key, chunk.shape) == ("model/w", (8, 6))
        assert torch.equal(chunk.values, chunk.box.view(whole))
        assert chunk.values.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "views, to be read into"


def test_replicas_share_the_writing_evenly_and_nothing_is_written_twice() -> None:
    replicated = [(f"w{i}", Box((0,), (10 + i,))) for i in range(40)]
    own = [[(f"only{rank}", Box((0,), (7,)))] for rank in range(4)]
    owned = assign_writers([[*replicated, *boxes] for boxes in own])
    assert sorted(box for boxes in owned for box in boxes if box in replicated) == sorted(replicated)
    assert all(set(boxes) <= owned[rank] for rank, boxes in enumerate(own))
    sizes = [sum(box.size for _, box in boxes) for boxes in owned]
    assert max(sizes) - min(sizes) <= 50


def test_the_worked_examples_in_comments() -> None:
    assert list(boxes_of_range((3, 4), 2, 9)) == [
        Box((0, 2), (1, 2)),
        Box((1, 0), (1, 4)),
        Box((2, 0), (1, 1)),
    ]
    saved, loaded = Box((0, 0), (3, 4)), Box((2, 0), (2, 4))
    common = saved.overlap(loaded)
    assert common == Box((2, 0), (1, 4))
    assert (common.relative_to(saved), common.relative_to(loaded)) == (Box((2, 0), (1, 4)), Box((0, 0), (1, 4)))
    gate_up = ShardedTensor.sliced("w", torch.empty(4, 1), Shard(dim=0, index=1, count=2, parts=2))
    assert [(local.start[0], global_box.start[0]) for local, global_box in gate_up.boxes] == [(0, 2), (2, 6)]
    columns = ShardedTensor.sliced("w", torch.empty(2, 3), Shard(dim=1, index=1, count=2))
    chunks = [chunk for (chunk,) in chunks_of_range(columns, (2, 3), 2, {"model": torch.arange(3)})]
    assert [chunk.box for chunk in chunks] == [Box((0, 5), (1, 1)), Box((1, 3), (1, 2))]
    assert [chunk.values.flatten().tolist() for chunk in chunks] == [[0], [1, 2]]
    sizes = {"A": 6, "B": 4, "C": 3, "D": 2}
    boxes = {name: (name, Box((0,), (size,))) for name, size in sizes.items()}
    owned = assign_writers([list(boxes.values()), [boxes[name] for name in "ABC"]])
    assert [sorted(name for name, _ in of_rank) for of_rank in owned] == [["A", "D"], ["B", "C"]]
