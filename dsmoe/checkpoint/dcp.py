"""Checkpoints in the terms of `torch.distributed.checkpoint`: planners of chunks, and a folder as storage.

The planners say what is written and what is read from where; the storage is a folder of safetensors files with a
manifest, whole or not there. The state dict that goes through both maps a tensor's name to its `Chunk`s on this rank.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dsmoe.checkpoint.folder import spare_name
from dsmoe.checkpoint.headers import BYTES
from dsmoe.checkpoint.manifest import MANIFEST, Facts, Manifest, StoredChunk, StoredTensor, chunk_name, tiles
from dsmoe.checkpoint.retention import discard, hidden_name, is_others, remove, remove_leftovers
from dsmoe.checkpoint.safetensors import DTYPES, NAMES, LazyTensor, read_tensor, write_tensors
from dsmoe.checkpoint.state import Chunk
from dsmoe.config.errors import UserError
from dsmoe.runtime.atomic_files import publish_folder, sync_folder, write_synced
from dsmoe.runtime.progress import Progress

logger = logging.getLogger(__name__)

FILE_BYTES = 1 << 33
"""Size from which on a rank begins another file."""

Chunks = dict[str, list[Chunk]]
"""The chunks of this rank by their tensor's name."""


def by_key(chunks: Iterable[Chunk]) -> Chunks:
    """Group chunks by their tensor's name."""
    found: Chunks = {}
    for chunk in chunks:
        found.setdefault(chunk.key, []).append(chunk)
    return found


# A save in torch's phases; between two of them every rank waits for all, and a failure of one becomes that of all:
#   every rank     create_local_plan, prepare_local_plan      its chunks as items
#   coordinator    create_global_plan, prepare_global_plan    tiling checked, folder made, its name in the plans
#   every rank     finish_plan, write_data                    its files, forced onto the disk
#   coordinator    finish                                     the manifest, then the folder's name
class ChunkSavePlanner(SavePlanner):
    """Plan to write every chunk given: no two ranks may be given the same element."""

    def set_up_planner(self, state_dict: Chunks, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Take the chunks."""
        # The first element names a chunk: no other has it.
        self._chunks = {(chunk.key, chunk.box.start): chunk for chunks in state_dict.values() for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        """One item per chunk."""
        return SavePlan([_write_item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plans as they are, and the tensors that their items make up."""
        # On the coordinator alone: only there are the plans of all ranks together.
        tensors: dict[str, TensorStorageMetadata] = {}
        for plan in all_plans:
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                tensor = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                tensor.chunks.append(data.chunk)
        # A gap or an overlap is found now, and not by the run that would have to resume from the checkpoint.
        for key, tensor in tensors.items():
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            if not tiles(tuple(tensor.size), boxes):
                raise RuntimeError(f"the ranks do not have every element of {key} once: {sorted(boxes)}")
        return all_plans, Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of an item."""
        assert write_item.index.offset is not None
        return self._chunks[write_item.index.fqn, tuple(write_item.index.offset)].values


class ChunkLoadPlanner(LoadPlanner):
    """Plan to read every chunk given, in full; `metadata` is the checkpoint's."""

    def set_up_planner(
        self, state_dict: Chunks, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the chunks and what is stored."""
        assert metadata is not None
        self._chunks, self._stored = state_dict, metadata.state_dict_metadata

    # A tensor of 6 x 4, stored by two ranks as rows 0-2 (index 0) and 3-5 (index 1); this rank wants rows 2-3. Items:
    #   storage index 0, storage offsets (2, 0), lengths (1, 4), destination offsets (0, 0)    row 2
    #   storage index 1, storage offsets (0, 0), lengths (1, 4), destination offsets (1, 0)    row 3
    def create_local_plan(self) -> LoadPlan:
        """One item per overlap of a stored box with a chunk's."""
        # A rank reads what it wants, whoever wrote it: the layouts need not be the same.
        items: list[ReadItem] = []
        for key, chunks in self._chunks.items():
            stored = self._stored[key]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = [_box_metadata(chunk.box.start, chunk.box.shape) for chunk in chunks]
            found = create_read_items_for_chunk_list(key, stored, wanted)
            # The stored boxes tile the tensor: as many elements as are wanted are all of them.
            assert sum(item.lengths.numel() for item in found) == sum(chunk.box.size for chunk in chunks)
            items.extend(found)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The view that an item's elements are to be written to."""
        # `index` counts the chunks of the tensor in the order of `wanted`, which is that of the state dict.
        index = read_item.dest_index
        assert index.index is not None
        values = self._chunks[index.fqn][index.index].values
        return values[tuple(map(_slice, read_item.dest_offsets, read_item.lengths))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view of the chunk's values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: checkpoints have no objects."""
        raise UserError(f"{read_item.dest_index.fqn} is not a tensor")


class FolderWriter(StorageWriter):
    """Write the folder `final`, under another name until all of it is on the disk.

    Args:
        final: the folder. One of that name which is there already is replaced; where it cannot be moved, `final`
            becomes another name of the same step.
        facts: the manifest's facts.
        account: where progress is reported.
    """

    def __init__(self, final: Path, facts: Facts, account: Progress | None = None) -> None:
        self.final, self._facts = final, facts
        self._account = account or Progress()
        self._partial = final  # until the coordinator has chosen a name

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, which changes nothing: a writer writes one folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do yet."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Remove what earlier saves have left, make the folder to write in, and tell every rank its name."""
        # On the coordinator alone, before any rank writes.
        folder = self.final.parent
        self._account.at("removing what earlier saves have left")
        remove_leftovers(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = hidden_name(self.final, "partial")
        self._account.at(f"making {self._partial.name}")
        self._partial.mkdir()
        sync_folder(folder.parent)  # the first save makes the folder of all
        self._account.waits("waiting to write")
        # The other ranks cannot guess the name: it differs where a leftover could not be removed.
        return [replace(plan, storage_data=self._partial.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files and force them onto the disk; each result has its `StoredChunk` and `StoredFile`."""
        self._partial = self.final.with_name(plan.storage_data)  # the coordinator's choice, by way of the plan
        results: list[WriteResult] = []
        self._account.expect(sum(map(_bytes, plan.items)))
        for number, items in enumerate(_files(plan.items)):
            # By rank: no two processes ever write to one file.
            name = f"rank_{dist.get_rank():05d}_{number:03d}.safetensors"
            self._account.at(name)
            tensors = [_lazy_tensor(item, planner) for item in items]
            # On the disk when this returns: the coordinator writes the manifest when all ranks have come so far.
            file, offsets = write_tensors(self._partial / name, tensors, None, self._account.add)
            for item, tensor, offset in zip(items, tensors, offsets, strict=True):
                assert item.index.offset is not None
                stored = StoredChunk(tuple(item.index.offset), tensor.shape, name, offset)
                results.append(WriteResult(item.index, tensor.bytes, (stored, file)))
        self._account.waits("all written")
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, then give the folder its name."""
        # A crash is harmless at any line: files and manifest are on the disk before the folder gets its name, and the
        # folder that it replaces is removed after that.
        # Where the elements are: only the rank that wrote them knows its files and offsets.
        written = {(r.index.fqn, r.index.offset): r.storage_data for rank in results for r in rank}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            stored = tuple(written[key, chunk.offsets][0] for chunk in tensor.chunks)
            tensors[key] = StoredTensor(NAMES[tensor.properties.dtype], tuple(tensor.size), stored)
        files = {chunk.file: file for chunk, file in written.values()}
        self._account.expect(0)
        self._account.at(f"writing {MANIFEST}")
        write_synced(self._partial / MANIFEST, Manifest(self._facts, files, tensors).text())
        # The files' names too: forcing a file onto the disk does not force the folder that names it.
        sync_folder(self._partial)
        self._account.at(f"renaming {self._partial.name}")
        # Aside first, because a rename does not replace a folder that has files.
        replaced = self._make_way() if os.path.lexists(self.final) else None
        publish_folder(self._partial, self.final)
        if replaced is not None:
            self._account.at(f"removing {replaced.name}")
            remove(replaced)
        self._account.waits("all written")

    def _make_way(self) -> Path | None:
        """Move aside what has the name already, and return its new path; take another name if that may not be."""
        try:
            if not is_others(self.final):
                # Not removed yet: that takes time, in which this step would have no checkpoint at all.
                return self.final.rename(hidden_name(self.final, "replaced"))
            why = "no save of dsmoe's has made it"
        except OSError as error:
            why = error.strerror or str(error)
        spare = spare_name(self.final)
        logger.warning("%s stays as it is (%s); saving %s beside it", self.final, why, spare.name)
        self.final = spare
        return None

    def discard(self) -> None:
        """Remove what a failed save has written."""
        # Equal until a name was chosen: then what is there is not of this save.
        if self._partial != self.final:
            discard(self._partial)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class FolderReader(StorageReader):
    """Read a folder that `FolderWriter` wrote and that has been checked.

    Args:
        checkpoint: the folder.
        manifest: the folder's, from `Manifest.read`.
        account: where progress is reported.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest, account: Progress | None = None) -> None:
        self._checkpoint, self._manifest = checkpoint, manifest
        self._account = account or Progress()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, which changes nothing: a reader reads one folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest's tensors."""
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(DTYPES[tensor.dtype]),
                torch.Size(tensor.shape),
                # In the manifest's order: a read item names its box by its number in this list.
                [_box_metadata(chunk.start, chunk.shape) for chunk in tensor.chunks],
            )
            for key, tensor in self._manifest.tensors.items()
        }
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do yet."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the elements to where the planner wants them, in the order of the files."""
        tensors = [self._manifest.tensors[item.storage_index.fqn] for item in plan.items]
        chunks = [t.chunks[item.storage_index.index or 0] for item, t in zip(plan.items, tensors, strict=True)]
        bytes_of = [item.lengths.numel() * BYTES[t.dtype] for item, t in zip(plan.items, tensors, strict=True)]
        self._account.expect(sum(bytes_of))
        # In the order of the disk, so that files are read from front to back.
        reads = zip(plan.items, tensors, chunks, bytes_of, strict=True)
        file = ""
        for item, tensor, chunk, size in sorted(reads, key=lambda read: (read[2].file, read[2].offset)):
            if chunk.file != file:
                file = chunk.file
                self._account.at(file)
            # A memory map, so that of a large stored box only the pages of the wanted part are read.
            stored = read_tensor(self._checkpoint / chunk.file, tensor.dtype, chunk.shape, chunk.offset)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, start, length)
            planner.resolve_tensor(item).copy_(stored)
            self._account.add(size)
        self._account.waits("all read")
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


def _box_metadata(start: Iterable[int], shape: Iterable[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(start), torch.Size(shape))


def _slice(start: int, length: int) -> slice:
    return slice(start, start + length)


def _write_item(chunk: Chunk) -> WriteItem:
    box = _box_metadata(chunk.box.start, chunk.box.shape)
    data = TensorWriteData(box, TensorProperties(chunk.values.dtype), torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.key, chunk.box.start), WriteItemType.SHARD, tensor_data=data)


def _files(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Group the items by file, those of wider elements first, so that all are aligned."""
    files: list[list[WriteItem]] = []
    size = FILE_BYTES  # the first item begins a file
    for item in sorted(items, key=lambda item: -_element_bytes(item)):
        # An item is never cut: a file ends with the item that brings it to the size.
        if size >= FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(item)
        size += _bytes(item)
    return files


def _element_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype.itemsize


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * _element_bytes(item)


def _lazy_tensor(item: WriteItem, planner: SavePlanner) -> LazyTensor:
    data, start = item.tensor_data, item.index.offset
    assert data is not None
    assert start is not None
    make = partial(planner.resolve_data, item)
    return LazyTensor(chunk_name(item.index.fqn, start), data.properties.dtype, tuple(data.chunk.sizes), make)  # type: ignore[arg-type]
