"""Which boxes of the whole model's tensors a rank's tensors are: what names the same weight on every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Which part of a whole weight this rank holds.

    Dimension `dim` is `parts` matrices one after the other (gate and up: 2), each of them cut into `count` equal
    slices, of which this is number `index`.
    """

    dim: int
    index: int
    count: int
    parts: int = 1

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of `whole`."""
        return self._slices(whole)[self.index].flatten(self.dim, self.dim + 1)

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the part into its place in `whole`."""
        self._slices(whole)[self.index].copy_(part.unflatten(self.dim, (self.parts, -1)))

    def whole_shape(self, part: torch.Size) -> list[int]:
        """The shape of the whole weight."""
        return [size * self.count if dim == self.dim else size for dim, size in enumerate(part)]

    def _slices(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return whole.unflatten(self.dim, (self.parts, -1)).chunk(self.count, dim=self.dim + 1)


@dataclass(frozen=True)
class Box:
    """An n-dimensional part of a tensor: where it starts, and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: torch.Size | tuple[int, ...]) -> Box:
        """The box that is the whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor`, a view."""
        return tensor[tuple(slice(first, first + size) for first, size in zip(self.start, self.shape, strict=True))]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both have, if anything."""
        start = tuple(map(max, self.start, other.start))
        ends = [
            min(first + size, there + other_size)
            for first, size, there, other_size in zip(self.start, self.shape, other.start, other.shape, strict=True)
        ]
        shape = tuple(end - first for first, end in zip(start, ends, strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def seen_from(self, other: Box) -> Box:
        """The same box, where `other` begins at zero."""
        return self.moved(tuple(-first for first in other.start))

    def moved(self, by: tuple[int, ...]) -> Box:
        """The same box somewhere else."""
        return Box(tuple(first + step for first, step in zip(self.start, by, strict=True)), self.shape)


@dataclass(frozen=True)
class Piece:
    """A box of a rank's tensor, and where in the whole tensor it is."""

    here: Box
    there: Box


@dataclass(frozen=True)
class Placement:
    """A rank's tensor as pieces of the one that one rank alone would have."""

    name: str
    """The whole tensor's, which is the same on every layout."""
    shape: tuple[int, ...]
    """The whole tensor's."""
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, name: str, tensor: torch.Tensor) -> Placement:
        """That of a tensor which every rank has all of."""
        everything = Box.all_of(tensor.shape)
        return cls(name, everything.shape, (Piece(everything, everything),))

    @classmethod
    def cut(cls, name: str, tensor: torch.Tensor, shard: Shard) -> Placement:
        """That of a tensor which is `shard` of the whole."""
        if shard.count == 1:
            return cls.whole(name, tensor)
        width = tensor.shape[shard.dim] // shard.parts
        shape = (*tensor.shape[: shard.dim], width, *tensor.shape[shard.dim + 1 :])

        def at(offset: int) -> Box:
            return Box(tuple(offset if dim == shard.dim else 0 for dim in range(tensor.dim())), shape)

        pieces = [
            Piece(at(part * width), at((part * shard.count + shard.index) * width)) for part in range(shard.parts)
        ]
        return cls(name, tuple(shard.whole_shape(tensor.shape)), tuple(pieces))

    def stacked(self, first: int, total: int) -> Placement:
        """The same, where dimension 0 is a part, from `first` on, of `total` entries."""
        by = (first, *(0 for _ in self.shape[1:]))
        pieces = tuple(Piece(piece.here, piece.there.moved(by)) for piece in self.pieces)
        return Placement(self.name, (total, *self.shape[1:]), pieces)
