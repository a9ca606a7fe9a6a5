"""From a range of a flattened tensor, which is what ZeRO gives a rank, to boxes of the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dsmoe.parallel.sharding import Box


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a tensor flattened row by row, as few boxes, in the order of the elements.

    At most 2 n - 1 boxes of n dimensions: whole rows in the middle, and before and after them parts of one row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _of_row(shape, start // row, start, stop)
        return
    yield from _of_row(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _of_row(shape, last, last * row, stop)


def _of_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    """Part of row `index`."""
    offset = index * math.prod(shape[1:])
    for box in boxes_of_range(shape[1:], start - offset, stop - offset):
        yield Box((index, *box.start), (1, *box.shape))
