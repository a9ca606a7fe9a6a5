"""The disk of `torch.distributed.checkpoint`: a folder of safetensors files and a manifest, whole or not there."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dsmoe.checkpoint.folder import spare_name
from dsmoe.checkpoint.headers import BYTES
from dsmoe.checkpoint.manifest import MANIFEST, Facts, Manifest, StoredBox, StoredFile, StoredTensor, box_name
from dsmoe.checkpoint.removal import discard, hidden_name, is_others, remove, remove_leftovers
from dsmoe.checkpoint.safetensors import DTYPES, NAMES, Item, read_tensor, write_items
from dsmoe.runtime.atomic_files import publish_folder, sync_folder, write_synced
from dsmoe.runtime.progress import Progress

logger = logging.getLogger(__name__)

FILE_BYTES = 1 << 33
"""A rank begins another file when one has become as large as this."""


@dataclass(frozen=True)
class Written:
    """Where a box was written, and what its file is."""

    name: str
    file: StoredFile
    offset: int


class FolderWriter(StorageWriter):
    """Writes the folder `final`, under another name until it is whole and on the disk.

    Args:
        final: the folder. One of that name which is there already is replaced; where it cannot be moved, `final`
            becomes another name of the same step.
        facts: what the manifest says besides.
        account: where it says how far it is.
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
        """Make the folder to write in, and tell every rank its name; what earlier saves have left goes first."""
        folder = self.final.parent
        self._account.at("removing what earlier saves have left")
        remove_leftovers(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = hidden_name(self.final, "partial")
        self._account.at(f"making {self._partial.name}")
        self._partial.mkdir()
        sync_folder(folder.parent)  # the first save makes the folder of all
        self._account.waits("waiting to write")
        return [replace(plan, storage_data=self._partial.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files and force them onto the disk."""
        self._partial = self.final.with_name(plan.storage_data)
        results: list[WriteResult] = []
        self._account.expect(sum(map(_bytes, plan.items)))
        for number, items in enumerate(_files(plan.items)):
            name = f"rank_{dist.get_rank():05d}_{number:03d}.safetensors"
            self._account.at(name)
            path, stored = self._partial / name, [_stored(item, planner) for item in items]
            file, offsets = write_items(path, stored, None, self._account.add)
            results += [
                WriteResult(item.index, _bytes(item), Written(name, file, offset))
                for item, offset in zip(items, offsets, strict=True)
            ]
        self._account.waits("all written")
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, then give the folder its name."""
        written = {(r.index.fqn, r.index.offset): r.storage_data for rank in results for r in rank}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(chunk, written[key, chunk.offsets]) for chunk in tensor.chunks]
            stored = (StoredBox(tuple(c.offsets), tuple(c.sizes), at.name, at.offset) for c, at in boxes)
            tensors[key] = StoredTensor(NAMES[tensor.properties.dtype], tuple(tensor.size), tuple(stored))
        files = {at.name: at.file for at in written.values()}
        self._account.expect(0)
        self._account.at(f"writing {MANIFEST}")
        write_synced(self._partial / MANIFEST, Manifest(self._facts, files, tensors).text())
        sync_folder(self._partial)
        self._account.at(f"renaming {self._partial.name}")
        replaced = self._make_way() if os.path.lexists(self.final) else None
        publish_folder(self._partial, self.final)
        if replaced is not None:
            self._account.at(f"removing {replaced.name}")
            remove(replaced)
        self._account.waits("all written")

    def _make_way(self) -> Path | None:
        """Move aside what has the name already, and return where to; if that may not be, take another name."""
        try:
            if not is_others(self.final):
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
        if self._partial != self.final:
            discard(self._partial)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class FolderReader(StorageReader):
    """Reads a folder that `FolderWriter` wrote and that has been checked.

    Args:
        checkpoint: the folder.
        manifest: its manifest, which `Manifest.read` gives.
        account: where it says how far it is.
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
                [ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape)) for box in tensor.boxes],
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
        tensors = self._manifest.tensors
        boxes = [tensors[item.storage_index.fqn].boxes[item.storage_index.index or 0] for item in plan.items]
        bytes_of = [item.lengths.numel() * BYTES[tensors[item.storage_index.fqn].dtype] for item in plan.items]
        self._account.expect(sum(bytes_of))
        in_order = sorted(
            zip(plan.items, boxes, bytes_of, strict=True), key=lambda read: (read[1].file, read[1].offset)
        )
        file = ""
        for item, box, size in in_order:
            if box.file != file:
                file = box.file
                self._account.at(file)
            dtype = tensors[item.storage_index.fqn].dtype
            stored = read_tensor(self._checkpoint / box.file, dtype, box.shape, box.offset)
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


def _files(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items by the file that they go to, those of wider elements first, so that all are aligned."""
    files: list[list[WriteItem]] = []
    size = FILE_BYTES
    for item in sorted(items, key=lambda item: -_element_bytes(item)):
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


def _stored(item: WriteItem, planner: SavePlanner) -> Item:
    """The item for `write_items`."""
    data, start = item.tensor_data, item.index.offset
    assert data is not None
    assert start is not None
    make = partial(planner.resolve_data, item)
    return Item(box_name(item.index.fqn, start), data.properties.dtype, tuple(data.chunk.sizes), make)  # type: ignore[arg-type]
