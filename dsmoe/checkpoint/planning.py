"""Our boxes in the terms of `torch.distributed.checkpoint`: what is to be written, and what is to be read from where.

The state dict that goes through it maps a tensor's name to the `Part`s of it on this rank.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsmoe.checkpoint.manifest import tiles
from dsmoe.checkpoint.state import Part
from dsmoe.config.errors import UserError

Parts = dict[str, list[Part]]


def by_key(parts: list[Part]) -> Parts:
    """The parts by the name of their tensor."""
    found: Parts = {}
    for part in parts:
        found.setdefault(part.key, []).append(part)
    return found


class PartsSavePlanner(SavePlanner):
    """Plans to write every part that it is given: no two ranks may be given the same element."""

    def set_up_planner(self, state_dict: Parts, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Take the parts."""
        self._parts = {(part.key, part.box.start): part for parts in state_dict.values() for part in parts}

    def create_local_plan(self) -> SavePlan:
        """One item per part."""
        return SavePlan([_write_item(part) for part in self._parts.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are, and the tensors that they make up."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for plan in all_plans:
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                tensor = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                tensor.chunks.append(data.chunk)
        for key, tensor in tensors.items():
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            if not tiles(tuple(tensor.size), boxes):
                raise RuntimeError(f"the ranks do not have every element of {key} once: {sorted(boxes)}")
        return all_plans, Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The elements."""
        assert write_item.index.offset is not None
        return self._parts[write_item.index.fqn, tuple(write_item.index.offset)].here


class PartsLoadPlanner(LoadPlanner):
    """Plans to read every part that it is given, in full; `metadata` is the checkpoint's."""

    def set_up_planner(self, state_dict: Parts, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the parts and what is stored."""
        assert metadata is not None
        self._parts, self._stored = state_dict, metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """Items from every stored box that has an element of a part."""
        items: list[ReadItem] = []
        for key, parts in self._parts.items():
            stored = self._stored[key]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = [ChunkStorageMetadata(torch.Size(p.box.start), torch.Size(p.box.shape)) for p in parts]
            found = create_read_items_for_chunk_list(key, stored, wanted)
            # The stored boxes tile the tensor, so that as many elements as are wanted are all of them.
            assert sum(item.lengths.numel() for item in found) == sum(part.box.size for part in parts)
            items.extend(found)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where an item's elements are to be written."""
        index = read_item.dest_index
        assert index.index is not None
        here = self._parts[index.fqn][index.index].here
        return here[tuple(map(_slice, read_item.dest_offsets, read_item.lengths))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view of ours."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Checkpoints have no objects."""
        raise UserError(f"{read_item.dest_index.fqn} is not a tensor")


def _slice(start: int, length: int) -> slice:
    return slice(start, start + length)


def _write_item(part: Part) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(part.box.start), torch.Size(part.box.shape))
    data = TensorWriteData(chunk, TensorProperties(part.here.dtype), torch.Size(part.shape))
    return WriteItem(MetadataIndex(part.key, part.box.start), WriteItemType.SHARD, tensor_data=data)
