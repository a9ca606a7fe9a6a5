"""Saving and loading the state of a run: what the trainer calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as torch_dcp

from dsmoe.checkpoint.compatibility import check_fits, check_types, refuse, tensor_rows
from dsmoe.checkpoint.dcp import ChunkLoadPlanner, FolderReader, by_key
from dsmoe.checkpoint.folder import Reading, check_headers, check_surely, checkpoint_name, inspect
from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Facts, Manifest
from dsmoe.checkpoint.safetensors import NAMES
from dsmoe.checkpoint.saving import Saver
from dsmoe.checkpoint.state import (
    BUFFER,
    MODEL,
    STEP,
    Chunk,
    EngineState,
    bad_state,
    layout_of,
    not_finite,
    owned_boxes,
    rng_chunks,
    rng_states,
    set_rng_states,
    versions,
)
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import MOMENTS, inner_optimizer
from dsmoe.parallel.random_weights import seed_of
from dsmoe.parallel.sharding import ShardedTensor
from dsmoe.runtime.processes import run_on_all_ranks, run_on_rank_0
from dsmoe.runtime.progress import Job
from dsmoe.runtime.waiting import run_watched
from dsmoe.runtime.watchdog import record_position

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PATIENCE = timedelta(hours=2)
"""Limit of the ranks' wait for the slowest disk among them."""


class NotFiniteError(DamagedError):
    """A checkpoint whose files are as they were written, and whose state is NaN or infinite: no model any more."""


class Checkpointer:
    """The checkpoints of one run. Making it is collective, before the first step, and so are all its methods.

    Args:
        folder: of the run's checkpoints.
        engine: DeepSpeed's.
        sharded: each parameter as boxes of the whole model, by its name in `engine.module`.
        config: the run.
        data: what is recorded of the text: the fields `corpora`, `order` and `held_out` of `Facts`.
    """

    def __init__(
        self,
        folder: Path,
        engine: DeepSpeedEngine,
        sharded: Mapping[str, ShardedTensor],
        config: Config,
        data: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self._engine, self._config = engine, config
        self._state = EngineState(engine, sharded)
        # A group of its own: a save must neither wait for training's collectives nor mix with them.
        make_group = partial(dist.new_group, backend="gloo", timeout=PATIENCE, group_desc="checkpoints")
        with Job("sharing", "agreeing which rank saves what", fails_on_lost_rank=True) as job:
            self._group = run_watched(make_group, job)
            # Once: which rank writes what follows from the layout, which a run does not change.
            self._owned = run_watched(lambda: owned_boxes(self._state.boxes(), self._group), job)
        self._saver = Saver(folder, config.checkpoint, self._group, engine.device.type == "cuda")
        self._saved_step: int | None = None
        """The last step that was saved to `folder`, or loaded from `folder`."""
        self._settings = config.model_dump(mode="json")
        self._layout = layout_of(config, engine.device)
        self._data = dict(data)

    def reserve(self) -> None:
        """Take the host memory that saving needs, so that the first save keeps training no longer than the others."""
        # One percent for what `bytes_to_save` leaves out: random states, buffers, counts, alignment.
        self._saver.buffer.reserve(int(1.01 * self._state.bytes_to_save(self._owned)))

    def save(self, step: int, tokens: int, validation_loss: float | None = None, *, tidies: bool = True) -> Path:
        """Save the state after `step` optimizer steps as `folder/step_XXXXXXXX`, and return that path.

        With `checkpoint.asynchronous`, returns when the state is in host memory; the save before is waited for. What
        goes wrong with the disk is logged, and raised by `flush`. Does nothing where this step is on the disk already.

        Args:
            step: optimizer steps done.
            tokens: tokens trained on.
            validation_loss: of an evaluation after this very step.
            tidies: remove the checkpoints that nothing keeps, when this one is written.

        Raises:
            LostRanksError: a rank has gone during this save or the one before.
        """
        engine, final = self._engine, self.folder / checkpoint_name(step)
        if step == self._saved_step and self._saver.failure is None:
            return final
        # The copies in host memory are overwritten next; the thread must be done with them.
        self._saver.wait_or_raise()
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
            versions=versions(),
            **self._data,
        )
        self._saver.save(facts, self._chunks(), tidies)
        return final

    def is_finite(self, also: torch.Tensor | None = None) -> bool:
        """Return whether all state of all ranks is finite now; collective, and the host waits for the device once.

        Args:
            also: a bool of this rank, on its device, that has to be true as well.
        """
        device = self._engine.device
        bad = not_finite(self._state.floats(), device).any()
        if also is not None:
            bad = bad | ~also.to(device)
        # One flag for all tensors and ranks: its read-back is the only wait for the device.
        dist.all_reduce(flag := bad.to(torch.int32), dist.ReduceOp.MAX)
        return not flag.item()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last save has ended, well or not, or cannot end; no longer than `seconds`."""
        self._saver.wait(seconds)

    def put_off(self, step: int) -> None:
        """Log that the save due after `step` waits for a step that is taken; again for each one due until then.

        Does nothing else: the caller saves when it may.
        """
        self._saver.put_off(step)

    def flush(self) -> None:
        """Wait until the last save has ended.

        Raises:
            SaveError: some rank could not write (disk full, no permission); the earlier checkpoints are untouched.
            LostRanksError: a rank has gone meanwhile.
        """
        self._saver.flush()

    def finish(self, is_signalled: Callable[[], bool] = lambda: False, is_stopping: bool = False) -> None:
        """End the last save at the end of a run: where a disk has failed, try again for as long as it is worth it.

        That is about as long as the lost work would take to do again, and seconds where a signal ends the run.

        Args:
            is_signalled: returns whether this rank has got a signal meanwhile: one more attempt, and no other.
            is_stopping: a signal ends the run already; the same on every rank.

        Raises:
            SaveError: in the end, the state is not on the disk.
            LostRanksError: a rank has gone meanwhile.
        """
        self._saver.finish(is_signalled, is_stopping)

    def load(self, checkpoint: Path) -> Facts:
        """Load the whole state of a checkpoint into the engine, whatever layout wrote it.

        Random states are those of the same ranks where the layout is the same, and else are derived from the seed, the
        step and the rank. (Routing noise and dropping have generators of their own, by step and rank.)

        Raises:
            DamagedError: a file is not what was written; the engine is unchanged.
            NotFiniteError: the files are, and the state is not finite: the engine has it now, and must load another.
            UserError: the checkpoint is of another model or optimizer, or unreadable now; the engine is unchanged.
        """
        manifest = self._checked(checkpoint)
        facts, engine = manifest.facts, self._engine
        check_fits(checkpoint, manifest, self._settings, type(inner_optimizer(engine)).__name__)
        chunks, finish = list(self._state.weights_to_load()), self._state.forget_moments
        # A checkpoint of a run that has taken no step has no moments: the optimizer is to be as before its first one.
        if any(key.startswith(f"{STEP}/") for key in manifest.tensors):
            moments, finish = self._state.moments_to_load()
            chunks += moments
        # Into copies: extra state is no view of the model's, and `load_state_dict` sets it.
        buffers = {name: torch.empty_like(x, device="cpu") for name, x in self._state.buffers().items()}
        chunks += [Chunk.whole(f"{BUFFER}/{name}", x) for name, x in buffers.items()]
        random = {}
        if facts.layout == self._layout:
            random = {name: torch.empty_like(x) for name, x in rng_states(engine.device).items()}
            chunks += rng_chunks(random)
        # Chunks are views of the engine's tensors: past its own checks, `_read` changes the engine.
        self._read(checkpoint, manifest, chunks, (MODEL, *MOMENTS, STEP, BUFFER))
        finish()
        self._state.set_buffers(buffers)
        if random:
            set_rng_states(random)
        else:
            # Seeds the GPU's generator too. By rank, or all of them would draw the same.
            torch.manual_seed(seed_of(self._config.train.seed, "resume", facts.step, dist.get_rank()))
        engine.global_steps = facts.step
        engine.skipped_steps = facts.skipped_steps
        # The scheduler sets the learning rates in its step, which also counts.
        engine.lr_scheduler.last_epoch = facts.schedule_step - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch misses an optimizer step before this one
            engine.lr_scheduler.step()
        # It is on the disk already: a save of this very step has nothing to do.
        if checkpoint.parent.absolute() == self.folder.absolute():
            self._saved_step = facts.step
        self._saver.misses.saved(facts.step)
        return facts

    def load_weights(self, checkpoint: Path) -> Facts:
        """Load only the parameters and selection biases of a checkpoint into the engine; everything else is new.

        Raises:
            DamagedError: a file is not what was written; the engine is unchanged.
            NotFiniteError: the files are, and the weights are not finite: the engine has them now.
            UserError: the checkpoint is of another model; the engine is unchanged.
        """
        manifest = self._checked(checkpoint)
        check_fits(checkpoint, manifest, self._settings, None)
        saved_buffers = {key.removeprefix(f"{BUFFER}/") for key in manifest.tensors if key.startswith(f"{BUFFER}/")}
        biases = {
            name: torch.empty_like(x, device="cpu")
            for name, x in self._state.buffers().items()
            if name.endswith(".bias") and name in saved_buffers
        }
        bias_chunks = [Chunk.whole(f"{BUFFER}/{name}", x) for name, x in biases.items()]
        self._read(checkpoint, manifest, [*self._state.weights_to_load(), *bias_chunks], (MODEL,))
        self._state.forget_moments()
        self._state.set_buffers(biases)
        return manifest.facts

    def _chunks(self) -> list[Chunk]:
        """Return what this rank writes."""
        chunks = [*self._state.to_save(self._owned), *rng_chunks(rng_states(self._engine.device))]
        # The same on every rank, and no element may be written twice.
        if dist.get_rank() == 0:
            chunks += [Chunk.whole(f"{BUFFER}/{name}", x) for name, x in self._state.buffers().items()]
        return chunks

    def _checked(self, checkpoint: Path) -> Manifest:
        """Return the manifest, when all ranks together have found every file to be what was written."""
        with Job("verification", f"verifying {checkpoint.name}", fails_on_lost_rank=True) as job:

            def look() -> Manifest:
                job.at(f"reading {MANIFEST}")
                return inspect(checkpoint)

            def check() -> None:
                # Each rank reads its share of the files, whoever wrote them: each file is read once.
                names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
                job.expect(sum(manifest.files[name].bytes for name in names))
                check_surely(checkpoint, manifest, names, Reading(job.at, job.add))
                job.waits("all verified")

            # By one rank, which tells the others: they must not judge two states of the folder.
            manifest = run_on_rank_0(look, job)
            run_on_all_ranks(check, job)
            return manifest

    def _read(self, checkpoint: Path, manifest: Manifest, chunks: list[Chunk], kinds: tuple[str, ...]) -> None:
        """Fill the chunks. Every tensor of `kinds` must be wanted by some rank, and every wanted tensor be stored."""
        with Job("load", f"loading {checkpoint.name}", fails_on_lost_rank=True) as job:
            own = {chunk.key: chunk.shape for chunk in chunks}
            # Of all ranks together: each wants its own experts only, and all must be there.
            wanted = {key: shape for shapes in run_on_all_ranks(lambda: own, job) for key, shape in shapes.items()}
            refuse(checkpoint, "another model", tensor_rows(manifest, wanted, kinds))

            def check() -> None:
                job.at("reading headers")
                check_headers(checkpoint, manifest, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
                # The manifest guarantees the type of masters; weights without a master may be casts of one.
                check_types(checkpoint, manifest, {c.key: NAMES[c.values.dtype] for c in chunks if not c.is_weight})
                job.waits("headers read")

            run_on_all_ranks(check, job)
            reader, planner = FolderReader(checkpoint, manifest, job), ChunkLoadPlanner()
            record_position(job.what)
            load = partial(torch_dcp.load, storage_reader=reader, planner=planner, process_group=self._group)
            run_watched(lambda: load(by_key(chunks)), job)
            bad = bad_state(chunks, self._engine.device)
            # On every rank, so that all raise: one alone would leave the others in their next collective.
            first = next((what for what in run_on_all_ranks(lambda: bad, job) if what), None)
        if first is not None:
            raise NotFiniteError(f"{checkpoint} has {first}")
