"""Ranges of flattened tensors as boxes, and boxes that tile a tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe.checkpoint.manifest import tiles
from dsmoe.checkpoint.ranges import boxes_of_range
from dsmoe.checkpoint.sharing import share
from dsmoe.checkpoint.state import spots
from dsmoe.parallel.sharding import Box, Placement, Shard

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
def test_boxes_of_a_range_are_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbered = torch.arange(size).view(shape)
    boxes = list(boxes_of_range(shape, start, stop))
    assert [number for box in boxes for number in box.of(numbered).flatten().tolist()] == list(range(start, stop))
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
def test_spots_lead_to_the_elements_of_the_whole_tensor(first: int, last: int) -> None:
    """Of a rank's slice of two stacked matrices (gate and up), a range of the flattened slice."""
    start, stop = min(first, last), max(first, last)
    shard = Shard(dim=0, index=1, count=2, parts=2)
    whole = torch.arange(8 * 6).view(8, 6)
    local = shard.of(whole)
    placement = Placement.cut("w", local, shard)
    here = local.reshape(-1)[start:stop]
    found = list(spots(placement, tuple(local.shape), start, stop - start))
    assert sum(spot.box.size for spot in found) == stop - start
    for spot in found:
        assert torch.equal(spot.part("model", here).here, spot.box.of(whole))


def test_replicas_share_the_writing_evenly_and_nothing_is_written_twice() -> None:
    replicated = [(f"w{i}", Box((0,), (10 + i,))) for i in range(40)]
    own = [[(f"only{rank}", Box((0,), (7,)))] for rank in range(4)]
    shares = share([[*replicated, *mine] for mine in own])
    assert sorted(box for mine in shares for box in mine if box in replicated) == sorted(replicated)
    assert all(set(mine) <= shares[rank] for rank, mine in enumerate(own))
    sizes = [sum(box.size for _, box in mine) for mine in shares]
    assert max(sizes) - min(sizes) <= 50
