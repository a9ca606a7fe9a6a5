"""Save and load the state of a run: what the trainer calls."""

from __future__ import annotations

import logging
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dsmoe.checkpoint.fit import check_fits, refuse, tensor_rows
from dsmoe.checkpoint.folder import checkpoint_name, inspect
from dsmoe.checkpoint.fragments import MOMENTS, inner_optimizer
from dsmoe.checkpoint.manifest import DamagedError, Facts, Manifest, UnreadableError, check_contents, check_headers
from dsmoe.checkpoint.planning import PartsLoadPlanner, PartsSavePlanner, by_key
from dsmoe.checkpoint.removal import remove_old
from dsmoe.checkpoint.sharing import NamedBox, own_share
from dsmoe.checkpoint.staging import HostBuffer
from dsmoe.checkpoint.state import (
    BUFFER,
    MODEL,
    STEP,
    EngineState,
    Part,
    not_finite,
    rng_parts,
    rng_states,
    set_rng_states,
    whole_part,
)
from dsmoe.checkpoint.storage import FolderReader, FolderWriter
from dsmoe.config.errors import UserError, describe, exit_code_of
from dsmoe.config.schema import Config
from dsmoe.parallel.boxes import Placement
from dsmoe.parallel.distributed import on_every_rank, on_first_rank
from dsmoe.parallel.draw import seed_of

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
LOOKS = (1.0, 4.0)
"""Seconds before each further look at a file that could not be read, or is not what was written."""


class SaveError(UserError):
    """A checkpoint could not be written; the earlier ones are untouched."""

    is_of_disk = False
    """Whether it was the disk that would not have it, which may at another try."""


class NotFiniteError(DamagedError):
    """A checkpoint whose files are as they were written, and whose state is no model any more: NaN or infinite."""


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
        # Of its own: a save must neither wait for training's collectives nor mix with them.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc="checkpoints")
        self._state = EngineState(engine, placements)
        self._owned: set[NamedBox] = own_share(self._state.boxes(), self._group)
        self._buffer = HostBuffer(engine.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._saved_step: int | None = None
        """The last step that was saved to `folder`, or loaded from it."""
        self._failed_in_a_row = 0
        self._safe = ("the beginning", time.time())
        """What would be gone on from after a crash, and since when that is so."""
        self._settings = config.model_dump(mode="json")
        self._layout = _layout(config, engine.device)
        self._data = dict(data)

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
        self.wait()
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
            **self._data,
        )
        self._facts, self._copies = facts, self._buffer.copy(self._parts())
        self._start(FolderWriter(final, facts), self._copies)
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
        flag = bad.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return not flag.item()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last save has come to an end, well or not, but no longer than `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def flush(self) -> None:
        """Wait until the last save has come to an end.

        Raises:
            SaveError: some rank could not write (disk full, no permission); the earlier checkpoints are untouched.
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
        """
        self.wait()
        begun, pause = time.monotonic(), PAUSES[0]
        least, most = WORTH_SECONDS
        worth = STOPPING_SECONDS if is_stopping else min(max(time.time() - self._safe[1], least), most)
        while self._failure is not None and self._failure.is_of_disk:
            left = worth - (time.monotonic() - begun)
            if self._any_rank(left < pause):
                break
            if dist.get_rank() == 0:
                logger.error("the last save is tried again in %.0f s, and for %.0f s at most", pause, left)
            if self._pause(pause, is_told, is_stopping):
                is_stopping, begun, worth = True, time.monotonic(), STOPPING_SECONDS
            self._start(FolderWriter(self.folder / checkpoint_name(self._facts.step), self._facts), self._copies)
            self.wait()
            pause = min(2 * pause, PAUSES[1])
        self.flush()

    def _pause(self, seconds: float, is_told: Callable[[], bool], is_stopping: bool) -> bool:
        """Wait, on all ranks alike; True as soon as a rank is told to stop, unless that is what the run does."""
        end = time.monotonic() + seconds
        while not self._any_rank(time.monotonic() >= end):
            if not is_stopping and self._any_rank(is_told()):
                return True
            time.sleep(min(0.5, seconds))
        return False

    def _any_rank(self, here: bool) -> bool:
        """Whether it is so on any rank, as all agree; no save may be under way."""
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
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
        self._safe = (f"step {facts.step}", time.time())
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
        manifest = on_first_rank(lambda: inspect(checkpoint))
        mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        on_every_rank(lambda: _check_surely(checkpoint, manifest, mine))
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
        checked = [(part.key, part.here) for part in parts if part.here.is_floating_point()]
        bad = not_finite(checked, self._engine.device).tolist()
        here_bad = next((key for (key, _), is_bad in zip(checked, bad, strict=True) if is_bad), None)
        first = next((key for key in on_every_rank(lambda: here_bad) if key is not None), None)
        if first is not None:
            raise NotFiniteError(f"{checkpoint} has a state that is not finite ({first} has NaN or infinite elements)")

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
            self._failure = _save_error(writer.final, error)
        except Exception as error:  # another rank is gone: training will find out as well
            self._failure = SaveError(f"cannot save {writer.final}: {error}")
        if dist.get_rank() != 0:
            return
        if self._failure is not None:
            self._failed_in_a_row += 1
            logger.error("%s%s", self._failure, self._since())
            return
        self._failed_in_a_row, self._safe = 0, (f"step {self._facts.step}", time.time())
        logger.info("saved %s in %.1f s", writer.final, time.perf_counter() - begun)
        try:
            remove_old(self.folder, self._config.checkpoint, writer.final)
        except Exception as error:  # whatever it is, the newest one is safe
            logger.error("cannot remove old checkpoints: %s", error)

    def _since(self) -> str:
        """What the log says besides when one save after the other fails."""
        if self._failed_in_a_row < 2:
            return ""
        what, since = self._safe
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        return (
            f". NO NEW CHECKPOINT SINCE {what.upper()} ({begun}): {self._failed_in_a_row} saves in a row have failed, "
            f"and what was trained since then is lost if the run ends now"
        )


def _check_surely(checkpoint: Path, manifest: Manifest, names: list[str]) -> None:
    """`check_contents`, and again where it finds something: a read that fails once is no damage."""
    for pause in LOOKS:
        try:
            return check_contents(checkpoint, manifest, names)
        except UnreadableError as error:
            logger.error("%s; looking again in %.0f s", error, pause)
            time.sleep(pause)
        except DamagedError:
            time.sleep(LOOKS[0])
            break
    return check_contents(checkpoint, manifest, names)


def _save_error(final: Path, error: CheckpointException) -> SaveError:
    """What went wrong where, without torch's tracebacks if it is the disk."""
    rank, (cause, _) = min(error.failures.items())
    where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
    reason = f"{describe(cause)}{where}" if isinstance(cause, OSError) else str(error)
    failure = SaveError(f"cannot save {final}: {reason}; the earlier checkpoints are there")
    failure.is_of_disk, failure.exit_code = isinstance(cause, OSError), exit_code_of(cause)
    return failure


def _layout(config: Config, device: torch.device) -> dict[str, Any]:
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    parallel = config.parallel.model_dump(mode="json")
    return {"ranks": ranks, **parallel, "precision": config.train.precision, "device": device.type}


def _versions() -> dict[str, str]:
    names = ("dsmoe", "torch", "deepspeed")
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}
