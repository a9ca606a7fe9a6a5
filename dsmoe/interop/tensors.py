"""The tensors of a model by dsmoe's names, from any source, each made of chunks that are read when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsmoe.checkpoint.headers import TensorEntry
from dsmoe.checkpoint.manifest import Manifest
from dsmoe.checkpoint.safetensors import DTYPES
from dsmoe.interop.model_files import read_entry
from dsmoe.parallel.sharding import Box


@dataclass(frozen=True)
class LazyChunk:
    """A box of a tensor whose values are read, or computed, when needed."""

    box: Box
    read: Callable[[], torch.Tensor]
    """Returns the values, in any shape with as many elements."""


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that chunks tile."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Sequence[LazyChunk]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """Return a box of the tensor, or all of it; at most one chunk besides is in memory."""
        wanted = Box.whole(self.shape) if box is None else box
        result = torch.empty(wanted.shape, dtype=self.dtype)
        for chunk in self.chunks:
            common = wanted.overlap(chunk.box)
            if common is not None:
                values = chunk.read().view(chunk.box.shape)
                common.relative_to(wanted).view(result).copy_(common.relative_to(chunk.box).view(values))
        return result


Tensors = Mapping[str, ChunkedTensor]
"""By key, as in a checkpoint's manifest: `model/embedding.weight`, `buffer/blocks.1.ffn.balance.bias`."""


def checkpoint_tensors(checkpoint: Path, manifest: Manifest) -> Tensors:
    """Return the tensors of a checkpoint."""

    def chunked(key: str) -> ChunkedTensor:
        tensor = manifest.tensors[key]
        chunks = []
        for stored in tensor.chunks:
            entry = TensorEntry(checkpoint / stored.file, tensor.dtype, stored.shape, stored.offset)
            chunks.append(LazyChunk(Box(stored.start, stored.shape), partial(read_entry, entry)))
        return ChunkedTensor(DTYPES[tensor.dtype], tensor.shape, chunks)

    return {key: chunked(key) for key in manifest.tensors}
