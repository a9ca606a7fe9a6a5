"""A checkpoint of ours that has weights and nothing else: a run begins with it by `checkpoint.weights_from`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dsmoe import __version__
from dsmoe.checkpoint.manifest import MANIFEST, Facts, Manifest, StoredBox, StoredFile, StoredTensor, box_name
from dsmoe.checkpoint.safetensors import NAMES, Item, write_items
from dsmoe.checkpoint.storage import FILE_BYTES
from dsmoe.config.schema import Config
from dsmoe.interop.tensors import Tensors, Tile
from dsmoe.runtime.atomic_files import write_synced

NO_OPTIMIZER = "none (weights only)"
"""What the manifest says of the optimizer, so that a run which wants its state says what it lacks."""


def write_checkpoint(folder: Path, config: Config, tensors: Tensors, origin: str, file_bytes: int = FILE_BYTES) -> None:
    """Write a checkpoint of step 0 into an empty folder, one tile of a tensor after the other.

    Args:
        folder: where.
        config: the run that the weights are for.
        tensors: its weights and selection biases; every tile becomes a box.
        origin: where they are from, for people.
        file_bytes: a file that has as much is followed by another.
    """
    files: dict[str, StoredFile] = {}
    boxes: dict[str, list[StoredBox]] = {key: [] for key in tensors}
    for number, tiles in enumerate(_files(tensors, file_bytes)):
        name = f"rank_00000_{number:03d}.safetensors"
        items = [
            Item(box_name(key, tile.box.start), tensors[key].dtype, tile.box.shape, _reader(tile))
            for key, tile in tiles
        ]
        files[name], offsets = write_items(folder / name, items)
        for (key, tile), offset in zip(tiles, offsets, strict=True):
            boxes[key].append(StoredBox(tile.box.start, tile.box.shape, name, offset))
    stored = {key: StoredTensor(NAMES[x.dtype], x.shape, tuple(boxes[key])) for key, x in tensors.items()}
    facts = Facts(
        step=0,
        tokens=0,
        skipped_steps=0,
        schedule_step=0,
        validation_loss=None,
        optimizer=NO_OPTIMIZER,
        config=config.model_dump(mode="json"),
        layout={"origin": origin},
        versions={"python": platform.python_version(), "dsmoe": __version__, "torch": torch.__version__},
    )
    write_synced(folder / MANIFEST, Manifest(facts, files, stored).text())


def _reader(tile: Tile) -> Callable[[], torch.Tensor]:
    return lambda: tile.read().view(tile.box.shape)


def _files(tensors: Tensors, file_bytes: int) -> Iterator[list[tuple[str, Tile]]]:
    """The tiles by the file that they go to, those of wider elements first, so that all are aligned."""
    current: list[tuple[str, Tile]] = []
    size = 0
    for key, tensor in sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize):
        for tile in tensor.tiles:
            if current and size >= file_bytes:
                yield current
                current, size = [], 0
            current.append((key, tile))
            size += tile.box.size * tensor.dtype.itemsize
    yield current
