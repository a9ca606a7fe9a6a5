"""The tensors of a model by our names, wherever they are stored and however they are cut there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe.checkpoint.manifest import Manifest
from dsmoe.interop.model_files import Slot
from dsmoe.parallel.sharding import Box


@dataclass(frozen=True)
class Tile:
    """A box of a tensor, and what gives it."""

    box: Box
    read: Callable[[], torch.Tensor]
    """Of any shape with as many elements."""


@dataclass(frozen=True)
class Tiled:
    """A tensor that tiles make up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tiles: Sequence[Tile]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """A box of it, or all; holds that and at most one tile in memory."""
        wanted = Box.all_of(self.shape) if box is None else box
        result = torch.empty(wanted.shape, dtype=self.dtype)
        for tile in self.tiles:
            common = wanted.overlap(tile.box)
            if common is not None:
                stored = tile.read().view(tile.box.shape)
                common.seen_from(wanted).of(result).copy_(common.seen_from(tile.box).of(stored))
        return result


Tensors = Mapping[str, Tiled]
"""By key, as in a checkpoint's manifest: `model/embedding.weight`, `buffer/blocks.1.ffn.balance.bias`."""


def checkpoint_tensors(checkpoint: Path, manifest: Manifest) -> Tensors:
    """Those of a checkpoint of ours."""

    def tiled(key: str) -> Tiled:
        stored = manifest.tensors[key]
        slots = [(box, Slot(checkpoint / box.file, stored.dtype, box.shape, box.offset)) for box in stored.boxes]
        tiles = [Tile(Box(box.start, box.shape), slot.read) for box, slot in slots]
        return Tiled(slots[0][1].torch_dtype, stored.shape, tiles)

    return {key: tiled(key) for key in manifest.tensors}
