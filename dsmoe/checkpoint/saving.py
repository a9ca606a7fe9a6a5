"""Saves in the background: a copy of the state in host memory, the thread that writes it, and failed attempts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as torch_dcp

from dsmoe.checkpoint.dcp import ChunkSavePlanner, FolderWriter, by_key
from dsmoe.checkpoint.folder import checkpoint_name
from dsmoe.checkpoint.manifest import Facts
from dsmoe.checkpoint.retention import remove_old
from dsmoe.checkpoint.state import Chunk
from dsmoe.config.errors import UserError, describe, exit_code_of
from dsmoe.config.schema import Checkpoint
from dsmoe.plan.text import quantity
from dsmoe.runtime.lost_ranks import LostRanksError, is_lost_rank_error
from dsmoe.runtime.progress import Job
from dsmoe.runtime.waiting import run_watched

logger = logging.getLogger(__name__)

WORTH_SECONDS = (60.0, 3600.0)
"""Between these, the last save is tried again for as long as the work since the last checkpoint has taken."""
STOPPING_SECONDS = 20.0
"""The limit after a signal, whose sender waits half a minute or so."""
PAUSES = (2.0, 120.0)
"""Seconds before the second attempt, which double with each one, and the most that they become."""
_ALIGNMENT = 8


class SaveError(UserError):
    """A checkpoint could not be written; the earlier ones are untouched."""

    is_of_disk = False
    """True if the system refused to write, which it may not do at another attempt."""

    @classmethod
    def from_exception(cls, final: Path, error: torch_dcp.CheckpointException) -> SaveError:
        """Name the path and the first rank's cause; without torch's tracebacks if the disk is the cause."""
        rank, (cause, _) = min(error.failures.items())
        where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
        reason = f"{describe(cause)}{where}" if isinstance(cause, OSError) else str(error)
        failure = cls(f"cannot save {final}: {reason}; the earlier checkpoints are there")
        failure.is_of_disk, failure.exit_code = isinstance(cause, OSError), exit_code_of(cause)
        return failure


@dataclass
class MissedSaves:
    """The saves in a row that were due and have given no checkpoint."""

    last: str = "the beginning"
    """The state that a run would resume from after a crash."""
    since: float = field(default_factory=time.time)
    """Unix time at which that state was saved."""
    failed: int = 0
    put_off: int = 0
    """Saves put off because steps were skipped."""

    def saved(self, step: int) -> None:
        """Begin to count anew from the checkpoint of `step`."""
        self.last, self.since, self.failed, self.put_off = f"step {step}", time.time(), 0, 0

    def warning(self) -> str:
        """Return what the log adds from the second missed save in a row on; else nothing."""
        if self.failed + self.put_off < 2:
            return ""
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        put_off = f"{quantity(self.put_off, 'save')} in a row put off while steps were skipped"
        failed = f"{self.failed} saves in a row have failed" if self.failed else ""
        what = " and ".join(part for part in (failed, put_off if self.put_off else "") if part)
        return (
            f". NO NEW CHECKPOINT SINCE {self.last.upper()} ({begun}): {what}, and what "
            f"was trained since then is lost if the run ends now"
        )


class HostBuffer:
    """Host memory for the copies, the same for every save; pinned where a GPU copies into it."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Hold at least `size` bytes.

        Writing zeros makes the system provide the pages now, rather than in the first save, which training waits for.
        """
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            self._bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def copy(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return the chunks with copies of their values; overwrites the copies made before. Waits for the GPU."""
        sizes = [chunk.values.numel() * chunk.values.element_size() for chunk in chunks]
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += size + -size % _ALIGNMENT  # a view as another dtype needs an aligned offset
        self.reserve(end)
        copies = []
        for chunk, begin, size in zip(chunks, begins, sizes, strict=True):
            copied = self._bytes[begin : begin + size].view(chunk.values.dtype).view(chunk.values.shape)
            # All copies are queued, and waited for once, below.
            copied.copy_(chunk.values, non_blocking=True)
            copies.append(replace(chunk, values=copied))
        if self._on_gpu:
            torch.cuda.synchronize()
        return copies


# Two threads; the second has a process group of its own, and writes while the first trains:
#   training    save: wait for the last one, copy, start    steps                       next save: wait, copy, start
#   save                                                    plan, write, rename, tidy   begins with new copies
class Saver:
    """One save at a time, written by a thread with the other ranks; the copies are kept for another attempt.

    All methods that wait are collective but for `wait`.

    Args:
        folder: of the run's checkpoints.
        options: section `checkpoint`.
        group: gloo, for saves alone: they must neither wait for training's collectives nor mix with them.
        on_gpu: True if the state is on a GPU.
    """

    def __init__(self, folder: Path, options: Checkpoint, group: dist.ProcessGroup, on_gpu: bool) -> None:
        self.folder, self._options, self._group = folder, options, group
        self.buffer = HostBuffer(on_gpu)
        self.misses = MissedSaves()
        self.failure: SaveError | LostRanksError | None = None
        """Failure of the last save."""
        self._thread: threading.Thread | None = None
        self._job: Job | None = None

    def save(self, facts: Facts, chunks: Sequence[Chunk], tidies: bool) -> None:
        """Copy this rank's chunks and begin to write the copies; with `tidies`, then remove old checkpoints."""
        # Training changes the state as soon as this returns: the thread and any further attempt see the copies alone.
        self._facts, self._copies, self._tidies = facts, self.buffer.copy(chunks), tidies
        self._start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last save has ended, well or not, or cannot end; no longer than `seconds`."""
        begun = time.monotonic()
        # Not one long join: the thread may wait for a lost rank until gloo gives up, after hours.
        while self._thread is not None and self._thread.is_alive():
            lost = None if self._job is None else self._job.check_lost()
            if lost is not None:
                self.failure = lost  # the thread waits for the rank that is gone, and is left alone
                return
            if seconds is not None and time.monotonic() - begun > seconds:
                return
            self._thread.join(0.1)

    def wait_or_raise(self) -> None:
        """Wait for the last save; raise LostRanksError where a rank was lost."""
        self.wait()
        if isinstance(self.failure, LostRanksError):
            raise self.failure

    def flush(self) -> None:
        """Wait for the last save; raise SaveError or LostRanksError where it failed."""
        self.wait()
        if self.failure is not None:
            raise self.failure

    def put_off(self, step: int) -> None:
        """Count a save that is put off, and say so in the log at the first one and from the second in a row on."""
        misses = self.misses
        misses.put_off += 1
        if dist.get_rank() == 0 and (misses.put_off == 1 or misses.warning()):
            logger.warning(
                "the save after step %d is put off, because steps are skipped (gradients are not finite), until one is "
                "taken; the last checkpoint is of %s%s",
                *(step, misses.last, misses.warning()),
            )

    def finish(self, is_signalled: Callable[[], bool], is_stopping: bool) -> None:
        """End the last save: while the disk refuses, try again for as long as the lost work would take."""
        self.wait()
        begun, pause = time.monotonic(), PAUSES[0]
        # Every rank sees the same failure, since it comes from a collective; clocks differ, so limits are agreed on.
        worth = min(max(time.time() - self.misses.since, WORTH_SECONDS[0]), WORTH_SECONDS[1])
        worth = STOPPING_SECONDS if is_stopping else worth
        while isinstance(self.failure, SaveError) and self.failure.is_of_disk:
            with Job("last save", "trying the last save again", fails_on_lost_rank=True) as job:
                left = worth - (time.monotonic() - begun)
                # The rank with the least time left decides: one that stopped alone would leave the others in the save.
                if self._any_rank(left < pause, job):
                    break
                if dist.get_rank() == 0:
                    logger.error("the last save is tried again in %.0f s, and for %.0f s at most", pause, left)
                if self._pause(pause, is_signalled, is_stopping, job):
                    # A signal starts a new, short period, with time for one more attempt.
                    is_stopping, begun, worth = True, time.monotonic(), STOPPING_SECONDS
            self._start()
            self.wait()
            pause = min(2 * pause, PAUSES[1])
        self.flush()

    def _pause(self, seconds: float, is_signalled: Callable[[], bool], is_stopping: bool, job: Job) -> bool:
        """Wait on all ranks alike; return True as soon as a rank gets a signal, unless the run is stopping already."""
        end = time.monotonic() + seconds
        while not self._any_rank(time.monotonic() >= end, job):
            if not is_stopping and self._any_rank(is_signalled(), job):
                return True
            time.sleep(min(0.5, seconds))
        return False

    def _any_rank(self, value: bool, job: Job) -> bool:
        """Return whether the value is True on any rank; no save may be under way."""
        flag = torch.tensor(int(value))
        run_watched(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group), job)
        return bool(flag)

    def _start(self) -> None:
        """Start a thread that writes the copies; without `checkpoint.asynchronous`, wait for the thread."""
        final = self.folder / checkpoint_name(self._facts.step)
        # Made by the thread that calls, which asks it about lost ranks while the other one writes.
        self._job = Job("save", f"saving {final.name}", fails_on_lost_rank=True)
        writer = FolderWriter(final, self._facts, self._job)
        # A daemon: storage that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, args=(writer, self._job), daemon=True, name="save")
        self._thread.start()
        if not self._options.asynchronous:
            self.wait_or_raise()

    def _write(self, writer: FolderWriter, job: Job) -> None:
        """Write with the other ranks, then remove what is kept no more; log what fails."""
        with job:
            if self._is_written(writer) and dist.get_rank() == 0 and self._tidies:
                job.fails_on_lost_rank = False  # the checkpoint is there, and the other ranks may be at their end
                job.at("removing older checkpoints")
                try:
                    remove_old(self.folder, self._options, writer.final)
                except Exception as error:  # no reason to fail: the newest checkpoint is safe
                    logger.error("cannot remove old checkpoints: %s", error)

    def _is_written(self, writer: FolderWriter) -> bool:
        """Write, and return whether all ranks have written; else the reason is in `failure` and in the log."""
        begun, self.failure = time.perf_counter(), None
        try:
            chunks = by_key(self._copies)
            # Collective, on the group of saves alone: training's collectives go on beside it.
            torch_dcp.save(chunks, storage_writer=writer, planner=ChunkSavePlanner(), process_group=self._group)
        except torch_dcp.CheckpointException as error:  # on every rank alike
            if dist.get_rank() == 0:
                writer.discard()
            self.failure = SaveError.from_exception(writer.final, error)
        except Exception as error:  # another rank is gone: training will find out as well
            kind = LostRanksError if is_lost_rank_error(error) else SaveError
            self.failure = kind(f"cannot save {writer.final}: {error}")
        if self.failure is not None:
            self.misses.failed += 1
            if dist.get_rank() == 0:
                logger.error("%s%s", self.failure, self.misses.warning())
            return False
        # Only now: until every rank has written, a crash would resume from the checkpoint before.
        self.misses.saved(self._facts.step)
        if dist.get_rank() == 0:
            logger.info("saved %s in %.1f s", writer.final, time.perf_counter() - begun)
        return True
