"""Writing a checkpoint of weights alone, with which a run begins by `checkpoint.weights_from`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dsmoe import __version__
from dsmoe.checkpoint.dcp import FILE_BYTES
from dsmoe.checkpoint.manifest import MANIFEST, Facts, Manifest, StoredChunk, StoredFile, StoredTensor, chunk_name
from dsmoe.checkpoint.safetensors import NAMES, LazyTensor, write_tensors
from dsmoe.config.schema import Config
from dsmoe.interop.tensors import LazyChunk, Tensors
from dsmoe.runtime.atomic_files import write_synced

NO_OPTIMIZER = "none (weights only)"
"""The optimizer in the manifest: a run that wants optimizer state is refused with this."""


def write_checkpoint(folder: Path, config: Config, tensors: Tensors, origin: str, file_bytes: int = FILE_BYTES) -> None:
    """Write a checkpoint of step 0 into an empty folder, one chunk in memory at a time.

    Args:
        folder: the empty folder.
        config: the run that the weights are for.
        tensors: the run's weights and selection biases; every chunk is stored as one.
        origin: a description of their source, for people.
        file_bytes: size from which on another file is begun.
    """
    files: dict[str, StoredFile] = {}
    stored: dict[str, list[StoredChunk]] = {key: [] for key in tensors}
    for number, chunks in enumerate(_files(tensors, file_bytes)):
        name = f"rank_00000_{number:03d}.safetensors"
        lazy = [
            LazyTensor(chunk_name(key, chunk.box.start), tensors[key].dtype, chunk.box.shape, _reader(chunk))
            for key, chunk in chunks
        ]
        files[name], offsets = write_tensors(folder / name, lazy)
        for (key, chunk), offset in zip(chunks, offsets, strict=True):
            stored[key].append(StoredChunk(chunk.box.start, chunk.box.shape, name, offset))
    entries = {key: StoredTensor(NAMES[x.dtype], x.shape, tuple(stored[key])) for key, x in tensors.items()}
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
    write_synced(folder / MANIFEST, Manifest(facts, files, entries).text())


def _reader(chunk: LazyChunk) -> Callable[[], torch.Tensor]:
    return lambda: chunk.read().view(chunk.box.shape)


def _files(tensors: Tensors, file_bytes: int) -> Iterator[list[tuple[str, LazyChunk]]]:
    """Group the chunks by file, those of wider elements first, so that all are aligned."""
    current: list[tuple[str, LazyChunk]] = []
    size = 0
    for key, tensor in sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize):
        for chunk in tensor.chunks:
            if current and size >= file_bytes:
                yield current
                current, size = [], 0
            current.append((key, chunk))
            size += chunk.box.size * tensor.dtype.itemsize
    yield current
