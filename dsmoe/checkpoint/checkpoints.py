"""Save and load the state of a run: what the trainer calls."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from dsmoe.checkpoint.failures import Misses, NotFiniteError, SaveError
from dsmoe.checkpoint.fit import check_fits, check_types, refuse, tensor_rows
from dsmoe.checkpoint.folder import check_surely, checkpoint_name, inspect
from dsmoe.checkpoint.manifest import MANIFEST, Facts, Manifest, Reading, check_headers
from dsmoe.checkpoint.planning import PartsLoadPlanner, PartsSavePlanner, by_key
from dsmoe.checkpoint.removal import remove_old
from dsmoe.checkpoint.safetensors import NAMES
from dsmoe.checkpoint.sharing import NamedBox, own_share
from dsmoe.checkpoint.staging import HostBuffer
from dsmoe.checkpoint.state import (
    BUFFER,
    MODEL,
    STEP,
    EngineState,
    Part,
    bad_state,
    layout_of,
    not_finite,
    rng_parts,
    rng_states,
    set_rng_states,
    versions,
    whole_part,
)
from dsmoe.checkpoint.storage import FolderReader, FolderWriter
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import MOMENTS, inner_optimizer
from dsmoe.parallel.random_weights import seed_of
from dsmoe.parallel.sharding import Placement
from dsmoe.runtime.lost_ranks import LostRanksError, is_lost_rank_error
from dsmoe.runtime.processes import run_on_all_ranks, run_on_rank_0
from dsmoe.runtime.progress import Job
from dsmoe.runtime.waiting import run_watched
from dsmoe.runtime.watchdog import record_position

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)
"""How long ranks wait for the slowest disk among them."""
WORTH_SECONDS = (60.0, 3600.0)
"""Between these, the last save is tried again for as long as the work since the last checkpoint has taken."""
STOPPING_SECONDS = 20.0
"""The same after a signal: whoever has sent it waits half a minute or so."""
PAUSES = (2.0, 120.0)
"""Seconds before the second attempt, which double with each one, and the most that they become."""


class Checkpoints:
    """The checkpoints of one run. Making it is collective, before the first step, and so are all its methods.

    Args:
        folder: where they are.
        engine: DeepSpeed's.
        placements: by each parameter's name in `engine.module`, where it is in the whole model.
        config: the run.
        data: what is recorded of the text: the fields `corpora`, `order` and `held_out` of `Facts`.
    """

    def __init__(
        self,
        folder: Path,
        engine: DeepSpeedEngine,
        placements: Mapping[str, Placement],
        config: Config,
        data: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self._engine, self._config = engine, config
        self._state = EngineState(engine, placements)
        # Of its own: a save must neither wait for training's collectives nor mix with them.
        make_group = partial(dist.new_group, backend="gloo", timeout=PATIENCE, group_desc="checkpoints")
        with Job("sharing", "agreeing which rank saves what", fails_on_lost_rank=True) as job:
            self._group = run_watched(make_group, job)
            self._owned: set[NamedBox] = run_watched(lambda: own_share(self._state.boxes(), self._group), job)
        self._buffer = HostBuffer(engine.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._job: Job | None = None
        self._failure: SaveError | LostRanksError | None = None
        self._saved_step: int | None = None
        """The last step that was saved to `folder`, or loaded from it."""
        self._misses = Misses()
        self._settings = config.model_dump(mode="json")
        self._layout = layout_of(config, engine.device)
        self._data = dict(data)

    def reserve(self) -> None:
        """Take the host memory that saving needs, so that the first save keeps training no longer than the others."""
        self._buffer.reserve(int(1.01 * self._state.bytes_to_save(self._owned)))

    def save(self, step: int, tokens: int, validation_loss: float | None = None, *, tidies: bool = True) -> Path:
        """Save the state after `step` optimizer steps as `folder/step_XXXXXXXX`, the path of which is returned.

        Ends when the state is in host memory, if `checkpoint.asynchronous`; a save before this one is waited for. What
        goes wrong with the disk is logged, and `flush` raises it. Does nothing where this step is on the disk already.
        Where it `tidies`, the checkpoints that nothing keeps are removed when this one is there.

        Raises:
            LostRanksError: a rank has gone while it or the save before was written.
        """
        engine, final = self._engine, self.folder / checkpoint_name(step)
        if step == self._saved_step and self._failure is None:
            return final
        self._wait_or_raise()
        self._saved_step, self._tidies = step, tidies
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
        self._facts, self._copies = facts, self._buffer.copy(self._parts())
        self._start(final)
        return final

    def is_finite(self, also: torch.Tensor | None = None) -> bool:
        """Whether all state of all ranks, as it is now, is finite; collective, and the host waits for the device once.

        Args:
            also: a bool of this rank, on its device, that has to be true as well.
        """
        device = self._engine.device
        bad = not_finite(self._state.floats(), device).any()
        if also is not None:
            bad = bad | ~also.to(device)
        dist.all_reduce(flag := bad.to(torch.int32), dist.ReduceOp.MAX)
        return not flag.item()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last save has come to an end, well or not, or will not; but no longer than `seconds`."""
        begun = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            lost = None if self._job is None else self._job.check_lost()
            if lost is not None:
                self._failure = lost  # the thread waits for the rank that is gone, and is left alone
                return
            if seconds is not None and time.monotonic() - begun > seconds:
                return
            self._thread.join(0.1)

    def _wait_or_raise(self) -> None:
        """The same, and raise LostRanksError where a rank was lost."""
        self.wait()
        if isinstance(self._failure, LostRanksError):
            raise self._failure

    def put_off(self, step: int) -> None:
        """Say that the save that is due after `step` waits for a step that is taken; again for each one due until then.

        Does nothing else: the caller saves when it may.
        """
        misses = self._misses
        misses.put_off += 1
        if dist.get_rank() == 0 and (misses.put_off == 1 or misses.warning()):
            logger.warning(
                "the save after step %d is put off, because steps are skipped (gradients are not finite), until one is "
                "taken; the last checkpoint is of %s%s",
                *(step, misses.last, misses.warning()),
            )

    def flush(self) -> None:
        """Wait until the last save has come to an end.

        Raises:
            SaveError: some rank could not write (disk full, no permission); the earlier checkpoints are untouched.
            LostRanksError: a rank has gone meanwhile.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    def finish(self, is_told: Callable[[], bool] = lambda: False, is_stopping: bool = False) -> None:
        """The same at the end of a run: where a disk has failed, try again for as long as it is worth it.

        That is about as long as it would take to do the lost work again, and seconds where a signal ends the run.

        Args:
            is_told: whether a signal has come to this rank meanwhile: one more attempt, and no other.
            is_stopping: a signal ends the run already; the same on every rank.

        Raises:
            SaveError: in the end, the state is not on the disk.
            LostRanksError: a rank has gone meanwhile.
        """
        self.wait()
        begun, pause = time.monotonic(), PAUSES[0]
        worth = min(max(time.time() - self._misses.since, WORTH_SECONDS[0]), WORTH_SECONDS[1])
        worth = STOPPING_SECONDS if is_stopping else worth
        while isinstance(self._failure, SaveError) and self._failure.is_of_disk:
            with Job("last save", "trying the last save again", fails_on_lost_rank=True) as job:
                left = worth - (time.monotonic() - begun)
                if self._any_rank(left < pause, job):
                    break
                if dist.get_rank() == 0:
                    logger.error("the last save is tried again in %.0f s, and for %.0f s at most", pause, left)
                if self._pause(pause, is_told, is_stopping, job):
                    is_stopping, begun, worth = True, time.monotonic(), STOPPING_SECONDS
            self._start(self.folder / checkpoint_name(self._facts.step))
            self.wait()
            pause = min(2 * pause, PAUSES[1])
        self.flush()

    def _pause(self, seconds: float, is_told: Callable[[], bool], is_stopping: bool, job: Job) -> bool:
        """Wait, on all ranks alike; True as soon as a rank is told to stop, unless that is what the run does."""
        end = time.monotonic() + seconds
        while not self._any_rank(time.monotonic() >= end, job):
            if not is_stopping and self._any_rank(is_told(), job):
                return True
            time.sleep(min(0.5, seconds))
        return False

    def _any_rank(self, is_so: bool, job: Job) -> bool:
        """Whether it is so on any rank, as all agree; no save may be under way."""
        flag = torch.tensor(int(is_so))
        run_watched(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group), job)
        return bool(flag)

    def load(self, checkpoint: Path) -> Facts:
        """Put the whole state of a checkpoint into the engine, whatever layout wrote it.

        Random states are those of the same ranks where the layout is the same, and else are derived from the seed, the
        step and the rank. (Routing noise and dropping have generators of their own, by step and rank.)

        Raises:
            DamagedError: it is not what was written; the engine is unchanged.
            NotFiniteError: it is, and its state is not finite: the engine has that now, and must load another one.
            UserError: it is of another model or optimizer, or cannot be read now; the engine is unchanged.
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
        if checkpoint.parent.absolute() == self.folder.absolute():
            self._saved_step = facts.step
        self._misses.saved(facts.step)
        return facts

    def load_weights(self, checkpoint: Path) -> Facts:
        """Put only the parameters of a checkpoint into the engine, and selection biases; everything else begins anew.

        Raises:
            DamagedError: it is not what was written; the engine is unchanged.
            NotFiniteError: it is, and its weights are not finite: the engine has them now.
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
        with Job("verification", f"verifying {checkpoint.name}", fails_on_lost_rank=True) as job:

            def look() -> Manifest:
                job.at(f"reading {MANIFEST}")
                return inspect(checkpoint)

            def check() -> None:
                mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
                job.expect(sum(manifest.files[name].bytes for name in mine))
                check_surely(checkpoint, manifest, mine, Reading(job.at, job.add))
                job.waits("all verified")

            manifest = run_on_rank_0(look, job)
            run_on_all_ranks(check, job)
            return manifest

    def _read(self, checkpoint: Path, manifest: Manifest, parts: list[Part], kinds: tuple[str, ...]) -> None:
        """Fill the parts; each tensor of these kinds must be wanted by some rank, and each that is wanted be there."""
        with Job("load", f"loading {checkpoint.name}", fails_on_lost_rank=True) as job:
            own = {part.key: part.shape for part in parts}
            wanted = {key: shape for shapes in run_on_all_ranks(lambda: own, job) for key, shape in shapes.items()}
            refuse(checkpoint, "another model", tensor_rows(manifest, wanted, kinds))

            def check() -> None:
                job.at("reading headers")
                check_headers(checkpoint, manifest, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
                # Of masters the manifest says it, and other weights may be casts of them.
                check_types(checkpoint, manifest, {p.key: NAMES[p.here.dtype] for p in parts if not p.is_weight})
                job.waits("headers read")

            run_on_all_ranks(check, job)
            reader, planner = FolderReader(checkpoint, manifest, job), PartsLoadPlanner()
            record_position(job.what)
            run_watched(
                partial(dcp.load, by_key(parts), storage_reader=reader, planner=planner, process_group=self._group), job
            )
            bad = bad_state(parts, self._engine.device)
            first = next((what for what in run_on_all_ranks(lambda: bad, job) if what), None)
        if first is not None:
            raise NotFiniteError(f"{checkpoint} has {first}")

    def _parts(self) -> list[Part]:
        """What this rank writes."""
        parts = [*self._state.to_save(self._owned), *rng_parts(rng_states(self._engine.device))]
        if dist.get_rank() == 0:
            parts += [whole_part(f"{BUFFER}/{name}", x) for name, x in self._state.buffers().items()]
        return parts

    def _start(self, final: Path) -> None:
        """Let a thread write the copies; without `checkpoint.asynchronous`, wait for it."""
        self._job = Job("save", f"saving {final.name}", fails_on_lost_rank=True)
        writer = FolderWriter(final, self._facts, self._job)
        self._thread = threading.Thread(target=self._write, args=(writer, self._job), daemon=True, name="save")
        self._thread.start()
        if not self._config.checkpoint.asynchronous:
            self._wait_or_raise()

    def _write(self, writer: FolderWriter, job: Job) -> None:
        """Write, with the other ranks, and then remove what is to be kept no more. Where that fails, say so."""
        with job:
            if self._is_written(writer) and dist.get_rank() == 0 and self._tidies:
                job.fails_on_lost_rank = False  # it is saved, and the others may be at their end
                job.at("removing older checkpoints")
                try:
                    remove_old(self.folder, self._config.checkpoint, writer.final)
                except Exception as error:  # whatever it is, the newest one is safe
                    logger.error("cannot remove old checkpoints: %s", error)

    def _is_written(self, writer: FolderWriter) -> bool:
        """Whether all ranks have written; else why not is in `_failure`, and in the log."""
        begun, self._failure = time.perf_counter(), None
        try:
            parts = by_key(self._copies)
            dcp.save(parts, storage_writer=writer, planner=PartsSavePlanner(), process_group=self._group)
        except dcp.CheckpointException as error:  # on every rank alike
            if dist.get_rank() == 0:
                writer.discard()
            self._failure = SaveError.of(writer.final, error)
        except Exception as error:  # another rank is gone: training will find out as well
            kind = LostRanksError if is_lost_rank_error(error) else SaveError
            self._failure = kind(f"cannot save {writer.final}: {error}")
        if self._failure is not None:
            self._misses.failed += 1
            if dist.get_rank() == 0:
                logger.error("%s%s", self._failure, self._misses.warning())
            return False
        self._misses.saved(self._facts.step)
        if dist.get_rank() == 0:
            logger.info("saved %s in %.1f s", writer.final, time.perf_counter() - begun)
        return True
