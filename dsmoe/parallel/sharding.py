"""Shards, boxes and sharded tensors: the places of a rank's tensors in the tensors of the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """The rule by which a rank's tensor is a slice of the whole one.

    Dimension `dim` holds `parts` matrices one after the other (gate and up: 2). Each is cut into `count` equal slices,
    of which the rank has number `index`.
    """

    dim: int
    index: int
    count: int
    parts: int = 1

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the rank's slice of `whole`."""
        return self._slices(whole)[self.index].flatten(self.dim, self.dim + 1)

    def put(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the rank's slice `local` into its place in `whole`."""
        self._slices(whole)[self.index].copy_(local.unflatten(self.dim, (self.parts, -1)))

    def whole_shape(self, local: torch.Size) -> list[int]:
        """Return the shape of the whole tensor, from the shape of the rank's slice."""
        return [size * self.count if dim == self.dim else size for dim, size in enumerate(local)]

    # Gate and up of 4 rows each, 8 rows together, in two slices: [8, D] -> [2, 4, D] -> two of [2, 2, D]. Slice 1 has
    # the rows 2, 3 of either part, rows 2, 3, 6, 7 of the whole. All of them are views: `put` writes into `whole`.
    def _slices(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return whole.unflatten(self.dim, (self.parts, -1)).chunk(self.count, dim=self.dim + 1)


@dataclass(frozen=True)
class Box:
    """An n-dimensional index range: its first index and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> Box:
        """Return the box of a whole tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements of `tensor` in the box, as a view."""
        return tensor[tuple(slice(first, first + size) for first, size in zip(self.start, self.shape, strict=True))]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    # Overlap when the layout changes, for a tensor of 6 x 4 cut along its rows:
    #   saved on 2 ranks, rank 0's box                     Box((0, 0), (3, 4))    rows 0, 1, 2
    #   loaded on 3 ranks, rank 1's box                    Box((2, 0), (2, 4))    rows 2, 3
    #   saved.overlap(loaded)                              Box((2, 0), (1, 4))    row 2
    #   common.relative_to(saved), where it is read        Box((2, 0), (1, 4))    row 2 of the stored tensor
    #   common.relative_to(loaded), where it is written    Box((0, 0), (1, 4))    row 0 of the rank's tensor

    def overlap(self, other: Box) -> Box | None:
        """Return the box of the common elements; None where there are none."""
        start = tuple(map(max, self.start, other.start))
        ends = [
            min(first + size, other_first + other_size)
            for first, size, other_first, other_size in zip(
                self.start, self.shape, other.start, other.shape, strict=True
            )
        ]
        shape = tuple(end - first for first, end in zip(start, ends, strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def relative_to(self, origin: Box) -> Box:
        """Return the same box with the start of `origin` as the zero index."""
        return self.shifted(tuple(-first for first in origin.start))

    def shifted(self, by: tuple[int, ...]) -> Box:
        """Return the box moved by `by` indices in each dimension."""
        return Box(tuple(first + step for first, step in zip(self.start, by, strict=True)), self.shape)


# A range of a flattened tensor as boxes: elements [2, 9) of a tensor of 3 x 4, numbered row by row.
#    0  1 [2  3]    Box((0, 2), (1, 2))    the end of row 0
#   [4  5  6  7]    Box((1, 0), (1, 4))    the whole rows in the middle, as one box
#   [8] 9 10 11     Box((2, 0), (1, 1))    the beginning of row 2
# Each of the two partial rows is again a range of a flattened tensor, of one dimension less.
def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the elements [start, stop) of a tensor flattened row by row as boxes, in the order of the elements.

    At most 2 n - 1 boxes for n dimensions: the whole rows in the middle, and a part of one row on either side.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        # Also a scalar, whose one element is the box without dimensions.
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # the range begins and ends within one row
        yield from _boxes_in_row(shape, start // row, start, stop)
        return
    # Nothing on either side where the range begins or ends with a row.
    yield from _boxes_in_row(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _boxes_in_row(shape, last, last * row, stop)


def _boxes_in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of a range that lies within row `index`."""
    offset = index * math.prod(shape[1:])
    for box in boxes_of_range(shape[1:], start - offset, stop - offset):
        yield Box((index, *box.start), (1, *box.shape))


@dataclass(frozen=True)
class ShardedTensor:
    """A rank's tensor as boxes of a global tensor, the one that the whole model has."""

    name: str
    """Name of the global tensor: the same on every layout."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    boxes: tuple[tuple[Box, Box], ...]
    """Pairs: a box of the rank's tensor, and the box of the global tensor with the same elements."""

    @classmethod
    def replicated(cls, name: str, tensor: torch.Tensor) -> ShardedTensor:
        """Describe a tensor that the rank has in full."""
        whole = Box.whole(tensor.shape)
        return cls(name, whole.shape, ((whole, whole),))

    @classmethod
    def sliced(cls, name: str, tensor: torch.Tensor, shard: Shard) -> ShardedTensor:
        """Describe a tensor that is the slice `shard` of the global one."""
        if shard.count == 1:
            return cls.replicated(name, tensor)
        # Gate and up, each of 4 rows, in a global tensor of 8 rows; rank 1 of 2, with 4 rows of its own (width 2):
        #   gate    local rows 0-1 are global rows 2-3: (0 * 2 + 1) * 2 = 2
        #   up      local rows 2-3 are global rows 6-7: (1 * 2 + 1) * 2 = 6
        width = tensor.shape[shard.dim] // shard.parts
        shape = (*tensor.shape[: shard.dim], width, *tensor.shape[shard.dim + 1 :])

        def box_at(offset: int) -> Box:
            return Box(tuple(offset if dim == shard.dim else 0 for dim in range(tensor.dim())), shape)

        boxes = tuple(
            (box_at(part * width), box_at((part * shard.count + shard.index) * width)) for part in range(shard.parts)
        )
        return cls(name, tuple(shard.whole_shape(tensor.shape)), boxes)

    def stacked(self, first: int, total: int) -> ShardedTensor:
        """Return the same with dimension 0 as entries `first` and following of a global stack of `total`."""
        by = (first, *(0 for _ in self.shape[1:]))
        boxes = tuple((local_box, global_box.shifted(by)) for local_box, global_box in self.boxes)
        return ShardedTensor(self.name, (total, *self.shape[1:]), boxes)
