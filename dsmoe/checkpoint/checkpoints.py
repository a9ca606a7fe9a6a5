"""Save and load the state of a run: what the trainer calls."""

from __future__ import annotations

import logging
import platform
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dsmoe.checkpoint.fit import check_fits, refuse, tensor_rows
from dsmoe.checkpoint.folder import checkpoint_name, inspect, remove_old
from dsmoe.checkpoint.fragments import MOMENTS, inner_optimizer
from dsmoe.checkpoint.manifest import Facts, Manifest, check_contents, check_headers
from dsmoe.checkpoint.planning import PartsLoadPlanner, PartsSavePlanner, by_key
from dsmoe.checkpoint.sharing import NamedBox, own_share
from dsmoe.checkpoint.staging import HostBuffer
from dsmoe.checkpoint.state import (
    BUFFER,
    MODEL,
    STEP,
    EngineState,
    Part,
    rng_parts,
    rng_states,
    set_rng_states,
    whole_part,
)
from dsmoe.checkpoint.storage import FolderReader, FolderWriter
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.parallel.boxes import Placement
from dsmoe.parallel.distributed import on_every_rank, on_first_rank
from dsmoe.parallel.draw import seed_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)
"""How long ranks wait for the slowest disk among them."""


class SaveError(UserError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run. Making it is collective, before the first step, and so are all its methods.

    Args:
        folder: where they are.
        engine: DeepSpeed's.
        placements: by each parameter's name in `engine.module`, where it is in the whole model.
        config: the run.
        corpora: by source, how many tokens and bytes of training text there are.
    """

    def __init__(
        self,
        folder: Path,
        engine: DeepSpeedEngine,
        placements: Mapping[str, Placement],
        config: Config,
        corpora: Mapping[str, list[int]] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self._engine, self._config = engine, config
        # Of its own: a save must neither wait for training's collectives nor mix with them.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc="checkpoints")
        self._state = EngineState(engine, placements)
        self._owned: set[NamedBox] = own_share(self._state.boxes(), self._group)
        self._buffer = HostBuffer(engine.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._saved_step: int | None = None
        """The last step that was saved to `folder`, or loaded from it."""
        self._settings = config.model_dump(mode="json")
        self._layout = _layout(config, engine.device)
        self._corpora = dict(corpora)

    def reserve(self) -> None:
        """Take the host memory that saving needs, so that the first save keeps training no longer than the others."""
        self._buffer.reserve(int(1.01 * self._state.bytes_to_save(self._owned)))

    def save(self, step: int, tokens: int, validation_loss: float | None = None) -> Path:
        """Save the state after `step` optimizer steps as `folder/step_XXXXXXXX`, the path of which is returned.

        Ends when the state is in host memory, if `checkpoint.asynchronous`; a save before this one is waited for. What
        goes wrong with the disk is logged, and `flush` raises it. Does nothing where this step is on the disk already.
        """
        engine, final = self._engine, self.folder / checkpoint_name(step)
        if step == self._saved_step and self._failure is None:
            return final
        if self._thread is not None:
            self._thread.join()
        self._saved_step = step
        facts = Facts(
            step=step,
            tokens=tokens,
            skipped_steps=engine.skipped_steps,
            schedule_step=engine.lr_scheduler.last_epoch,
            validation_loss=validation_loss,
            optimizer=type(inner_optimizer(engine)).__name__,
            config=self._settings,
            layout=self._layout,
            versions=_versions(),
            corpora=self._corpora,
        )
        self._start(FolderWriter(final, facts), self._buffer.copy(self._parts()))
        return final

    def wait(self, seconds: float) -> None:
        """Wait until the last save has come to an end, well or not, but no longer than `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def flush(self) -> None:
        """Wait until the last save has come to an end.

        Raises:
            SaveError: some rank could not write (disk full, no permission); the earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def load(self, checkpoint: Path) -> Facts:
        """Put the whole state of a checkpoint into the engine, whatever layout wrote it.

        Random states are those of the same ranks where the layout is the same, and else are derived from the seed, the
        step and the rank. (Routing noise and dropping have generators of their own, by step and rank.)

        Raises:
            DamagedError: it is not what was written; the engine is unchanged.
            UserError: it is of another model or optimizer; the engine is unchanged.
        """
        manifest = self._checked(checkpoint)
        facts, engine = manifest.facts, self._engine
        check_fits(checkpoint, manifest, self._settings, type(inner_optimizer(engine)).__name__)
        parts, finish = list(self._state.weights_to_load()), self._state.forget_moments
        if any(key.startswith(f"{STEP}/") for key in manifest.tensors):
            moments, finish = self._state.moments_to_load()
            parts += moments
        buffers = {name: torch.empty_like(x, device="cpu") for name, x in self._state.buffers().items()}
        parts += [whole_part(f"{BUFFER}/{name}", x) for name, x in buffers.items()]
        random = {}
        if facts.layout == self._layout:
            random = {name: torch.empty_like(x) for name, x in rng_states(engine.device).items()}
            parts += rng_parts(random)
        self._read(checkpoint, manifest, parts, (MODEL, *MOMENTS, STEP, BUFFER))
        finish()
        self._state.set_buffers(buffers)
        if random:
            set_rng_states(random)
        else:
            torch.manual_seed(seed_of(self._config.train.seed, "resume", facts.step, dist.get_rank()))
        engine.global_steps = facts.step
        engine.skipped_steps = facts.skipped_steps
        engine.lr_scheduler.last_epoch = facts.schedule_step - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch misses an optimizer step before this one
            engine.lr_scheduler.step()
        if checkpoint.absolute() == (self.folder / checkpoint_name(facts.step)).absolute():
            self._saved_step = facts.step
        return facts

    def load_weights(self, checkpoint: Path) -> Facts:
        """Put only the parameters of a checkpoint into the engine, and selection biases; everything else begins anew.

        Raises:
            DamagedError: it is not what was written; the engine is unchanged.
            UserError: it is of another model; the engine is unchanged.
        """
        manifest = self._checked(checkpoint)
        check_fits(checkpoint, manifest, self._settings, None)
        saved_buffers = {key.removeprefix(f"{BUFFER}/") for key in manifest.tensors if key.startswith(f"{BUFFER}/")}
        biases = {
            name: torch.empty_like(x, device="cpu")
            for name, x in self._state.buffers().items()
            if name.endswith(".bias") and name in saved_buffers
        }
        parts = [*self._state.weights_to_load(), *(whole_part(f"{BUFFER}/{name}", x) for name, x in biases.items())]
        self._read(checkpoint, manifest, parts, (MODEL,))
        self._state.forget_moments()
        self._state.set_buffers(biases)
        return manifest.facts

    def _checked(self, checkpoint: Path) -> Manifest:
        """The manifest, when all ranks together have found every file to be what was written."""
        manifest = on_first_rank(lambda: inspect(checkpoint))
        mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        on_every_rank(lambda: check_contents(checkpoint, manifest, mine))
        return manifest

    def _read(self, checkpoint: Path, manifest: Manifest, parts: list[Part], kinds: tuple[str, ...]) -> None:
        """Fill the parts; each tensor of these kinds must be wanted by some rank, and each that is wanted be there."""
        here = {part.key: part.shape for part in parts if part.key.partition("/")[0] in kinds}
        wanted: dict[str, tuple[int, ...]] = {}
        for shapes in on_every_rank(lambda: here):
            wanted |= shapes
        refuse(checkpoint, "another model", tensor_rows(manifest, wanted, kinds))
        mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        on_every_rank(lambda: check_headers(checkpoint, manifest, mine))
        dcp.load(
            by_key(parts),
            storage_reader=FolderReader(checkpoint, manifest),
            planner=PartsLoadPlanner(),
            process_group=self._group,
        )

    def _parts(self) -> list[Part]:
        """What this rank writes."""
        parts = [*self._state.to_save(self._owned), *rng_parts(rng_states(self._engine.device))]
        if dist.get_rank() == 0:
            parts += [whole_part(f"{BUFFER}/{name}", x) for name, x in self._state.buffers().items()]
        return parts

    def _start(self, writer: FolderWriter, parts: list[Part]) -> None:
        """Let a thread write the parts; without `checkpoint.asynchronous`, wait for it."""
        self._thread = threading.Thread(target=self._write, args=(writer, parts), daemon=True, name="dsmoe checkpoint")
        self._thread.start()
        if not self._config.checkpoint.asynchronous:
            self._thread.join()

    def _write(self, writer: FolderWriter, parts: list[Part]) -> None:
        """Write, with the other ranks, and then remove what is to be kept no more. Where that fails, say so."""
        begun, self._failure = time.perf_counter(), None
        try:
            dcp.save(by_key(parts), storage_writer=writer, planner=PartsSavePlanner(), process_group=self._group)
        except CheckpointException as error:  # on every rank alike
            if dist.get_rank() == 0:
                writer.discard()
            self._failure = SaveError(
                f"cannot save {writer.final}: {_reason(error)}; the earlier checkpoints are there"
            )
        except Exception as error:  # another rank is gone: training will find out as well
            self._failure = SaveError(f"cannot save {writer.final}: {error}")
        if dist.get_rank() != 0:
            return
        if self._failure is not None:
            logger.error("%s", self._failure)
            return
        logger.info("saved %s in %.1f s", writer.final, time.perf_counter() - begun)
        try:
            remove_old(self.folder, self._config.checkpoint)
        except OSError as error:
            logger.error("cannot remove old checkpoints: %s", error)


def _reason(error: CheckpointException) -> str:
    """What went wrong where, without torch's tracebacks if it is the disk."""
    rank, (cause, _) = min(error.failures.items())
    where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
    if isinstance(cause, OSError) and cause.filename:
        return f"{cause.filename}: {cause.strerror}{where}"
    return str(error)


def _layout(config: Config, device: torch.device) -> dict[str, Any]:
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    parallel = config.parallel.model_dump(mode="json")
    return {"ranks": ranks, **parallel, "precision": config.train.precision, "device": device.type}


def _versions() -> dict[str, str]:
    names = ("dsmoe", "torch", "deepspeed")
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}
