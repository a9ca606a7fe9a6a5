"""Progress of all ranks in a long job, such as writing a checkpoint, logged once a minute.

Storage that hangs raises nothing, and ranks that wait for a slow one have nothing to log. So every rank keeps its
progress in such a job, and the watchdog publishes it with each heartbeat. When a job has taken a minute, rank 0 reads
all of them and logs a line, and so every further minute. If rank 0 logs nothing (its process stands still, or its log
is on the storage that hangs), rank 1 and the leader of every other host log instead. Of a job that ends before, nobody
reads anything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dsmoe.plan.text import ranks_on_hosts
from dsmoe.runtime.heartbeat import HeartbeatTimer, call_with_timeout
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.reporting_rank import logs_progress
from dsmoe.runtime.watchdog import GRACE_SECONDS, STORE_SECONDS, Position, Watchdog, process_watchdog, read_positions
from dsmoe.runtime.world import launcher_has_store

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 60.0
"""The time to the first line, and between lines."""
POLL_SECONDS = 5.0
"""The time between two reads of the ranks' progress."""
LOST_SECONDS = 60.0
"""A rank that had begun the job is lost after so long without a heartbeat: longer than a debugger stops one."""
LOG_TIMEOUT_SECONDS = 10.0
"""The time allowed to log a line: the log may be on the storage that hangs."""
MAX_SHOWN_RANKS = 8
WORKING, WAITING, DONE, ABSENT = "working", "waiting", "over", "away"
_NOT_BEGUN = "waiting to begin"


class Progress:
    """The progress of this rank in its part of a job."""

    def __init__(self) -> None:
        self._state, self._place = WAITING, _NOT_BEGUN
        self._done = self._total = 0
        self._unit = ""
        self._moved = time.monotonic()

    def at(self, place: str) -> None:
        """Set what this rank works on, such as a file."""
        self._set(WORKING, place)

    def waits(self, place: str) -> None:
        """Set what this rank waits for, or that its part is done."""
        self._set(WAITING, place)

    @property
    def has_wait_reason(self) -> bool:
        """True if `waits` was called after the last `at`."""
        return self._state == WAITING and self._place != _NOT_BEGUN

    def expect(self, total: int, unit: str = "") -> None:
        """Set the total amount: in `unit` (`batches`), by default in bytes."""
        self._done, self._total, self._unit = 0, total, unit

    def add(self, amount: int) -> None:
        """Add to the amount that is done; costs two assignments."""
        self._done += amount
        self._moved = time.monotonic()

    def snapshot(self) -> tuple[str, str, float]:
        """Return the state, the place with the amount done, and the seconds since either changed."""
        place, idle = self._place, time.monotonic() - self._moved
        since = "" if idle < GRACE_SECONDS else f" for {idle:.0f} s"
        if self._state == WORKING and self._total:
            done = f"{_amount(self._done, self._total, self._unit)}, at {place}"
            place = f"{done}, without a move{since}" if since else done
        elif self._state == WORKING:
            place += since
        return self._state, place, round(idle, 1)

    def _set(self, state: str, place: str) -> None:
        self._state, self._place, self._moved = state, place, time.monotonic()


class Job(Progress):
    """This rank's part in a job of all ranks; a context manager, which all ranks enter in the same order.

    With `fails_on_lost_rank`, entering and leaving publish at once: not for a thread that must not wait for the store.

    Args:
        kind: there is one job of a kind at a time.
        what: the job's name in messages: `saving step_00000100`.
        fails_on_lost_rank: whether a lost rank sets `lost_error`; else it is only logged.
        watch: the watchdog, by default that of this process.
    """

    def __init__(
        self, kind: str, what: str, *, fails_on_lost_rank: bool = False, watch: Watchdog | None = None
    ) -> None:
        super().__init__()
        self.kind, self.what, self.fails_on_lost_rank = kind, what, fails_on_lost_rank
        self.lost_error: LostRanksError | None = None
        """The error that names a lost rank for which others wait in this job; set on ranks that monitor it."""
        self.ended = threading.Event()
        self._rank_0_missing_since: float | None = None
        self._watch = watch or process_watchdog()
        self.number = self._watch.jobs[kind].number + 1 if kind in self._watch.jobs else 1

    def __enter__(self) -> Job:
        """Publish the progress from now on, and monitor the job if this is one of the ranks that log."""
        self._watch.jobs[self.kind] = self
        if self.fails_on_lost_rank:  # only a rank that is known to have begun can be lost from the job
            call_with_timeout(STORE_SECONDS, self._watch._publish)
        if logs_progress(self._watch.rank):
            monitor = _ProgressMonitor(self, self._watch)
            threading.Thread(target=monitor.run, daemon=True, name="dsmoe job").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End this rank's part, and keep publishing that until the next job of this kind."""
        self._set(DONE, "done")
        self.ended.set()
        if self.fails_on_lost_rank:  # a rank that ends now must not be taken for lost
            call_with_timeout(STORE_SECONDS, self._watch._publish)

    def check_lost(self) -> LostRanksError | None:
        """Return the error if a rank is lost, so that this job cannot end; for repeated calls while waiting in it.

        A rank that does not monitor the job itself learns of rank 0 alone, and later: after
        `Watchdog.has_lost_rank_0`, and then `GRACE_SECONDS`, since a process that stood still itself must first be able
        to read the others' heartbeats.
        """
        if not self._watch.has_lost_rank_0():
            self._rank_0_missing_since = None
        elif self._rank_0_missing_since is None:
            self._rank_0_missing_since = time.monotonic()
        elif self.lost_error is None and time.monotonic() - self._rank_0_missing_since > GRACE_SECONDS:
            self.lost_error = LostRanksError(f"{self.what}: rank 0 does not come")
        return self.lost_error

    def published(self) -> list[Any]:
        """Return what the watchdog publishes: the job's number, then `snapshot`."""
        return [self.number, *self.snapshot()]


class _ProgressMonitor:
    """The progress of all ranks in a job as read by this rank, and the lines that it has logged."""

    # Silence is counted in `_watched`, seconds in which this process polled and the store answered. With polls every
    # 5 s, LOST_SECONDS = 60, and rank 2 dead after the first:
    #   poll  _watched  rank 2's heartbeat  _beaten[2]  silence
    #   1            5                  41           5        0
    #   2           10                  41           5        5
    #   3 (the host was suspended for an hour: it counts as _max_interval = 25 s)
    #               35                  41           5       30
    #   ...         70                  41           5       65   > 60: rank 2 is lost

    def __init__(self, job: Job, watch: Watchdog) -> None:
        self._job, self._watch = job, watch
        self._store: dist.Store | None = None
        self._positions: dict[int, Position] = {}
        self._max_interval = 3 * POLL_SECONDS + LOG_TIMEOUT_SECONDS
        """Longer than two polls are apart in a running process."""
        self._store_timer = HeartbeatTimer(self._max_interval)
        self._watched = 0.0
        self._beaten: dict[int, float] = {}
        """`_watched` at the last change of each rank's heartbeat."""
        self._seen: dict[int, float] = {}
        """`_watched` when each rank's heartbeat was last read."""
        self._begun = self._polled = self._line_at = time.monotonic()
        self._next_line = self._begun + LOG_INTERVAL_SECONDS
        self._lines_key = f"dsmoe/job/{job.kind}/words"
        """The store's key by which rank 0 announces that it has logged a line."""
        self._num_lines, self._last_line = 0, ""
        """The number of lines that this rank has logged, and the last value of the key, read at `_line_at`."""

    def run(self) -> None:
        """Poll until the job has ended or a rank is lost."""
        while not self._job.ended.wait(POLL_SECONDS):
            if time.monotonic() - self._begun < LOG_INTERVAL_SECONDS / 2:
                continue
            if self._watch.rank == 0:
                self._poll(range(self._watch.world_size))
                self._log_if_due()
            else:
                self._poll([0])
                patience = LOG_INTERVAL_SECONDS + 2 * POLL_SECONDS + LOG_TIMEOUT_SECONDS
                # Hosts are many, and each of them would read the positions of all ranks.
                if time.monotonic() - self._line_at > patience and time.monotonic() >= self._next_line:
                    self._poll(range(self._watch.world_size))
                    self._log_if_due()
            if self._job.fails_on_lost_rank and (lost := self._lost()) is not None:
                self._log(lost)  # before the main thread ends the run for it
                self._job.lost_error = LostRanksError(lost)
                return

    def _poll(self, ranks: Sequence[int]) -> None:
        """Read the positions of `ranks`, and whether rank 0 has logged."""
        found = call_with_timeout(2 * STORE_SECONDS, lambda: self._read(ranks))
        self._store_timer.update(found is not None)
        before, self._polled = self._polled, time.monotonic()
        if found is None:
            self._store = None  # another connection next time
            return
        positions, line = found
        if line != self._last_line:
            self._last_line, self._line_at = line, time.monotonic()
        self._watched += min(self._polled - before, self._max_interval)
        for rank, position in positions.items():
            if rank not in self._positions or position.heartbeat != self._positions[rank].heartbeat:
                self._beaten[rank] = self._watched
            self._seen[rank] = self._watched
        self._positions |= positions

    def _read(self, ranks: Sequence[int]) -> tuple[dict[int, Position], str]:
        if self._store is None:
            self._store = self._watch.store.clone()
        store, key = self._store, self._lines_key
        line = store.get(key).decode() if store.check([key]) else ""
        return read_positions(store, ranks), line

    def _log_if_due(self) -> None:
        """Log a line if one is due, and announce it if this is rank 0."""
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + LOG_INTERVAL_SECONDS
        line = f"{self._job.what} has taken {now - self._begun:.0f} s so far. {self._summary()}"
        if self._log(line) and self._watch.rank == 0:
            self._num_lines += 1
            store, announced = self._store, f"{self._job.number} {self._num_lines}"
            if store is not None:
                call_with_timeout(STORE_SECONDS, lambda: store.set(self._lines_key, announced))

    def _log(self, line: str) -> bool:
        """Return whether the line is in the log; the console has it before a file on storage that hangs."""
        level = logging.WARNING if self._watch.rank == 0 else logging.ERROR  # the console of other ranks has no less

        def log() -> bool:
            logger.log(level, "%s", line)
            return True

        return call_with_timeout(LOG_TIMEOUT_SECONDS, log) is not None

    def _summary(self) -> str:
        """The progress of the ranks, as far as this one knows."""
        if self._store_timer.seconds > GRACE_SECONDS:
            own = self._watch.position()[0]
            positions = {self._watch.rank: replace(own, jobs={self._job.kind: self._job.published()})}
            return f"{self._watch.explain_without_store()}; {summarize(self._job, positions, {})}"
        return summarize(self._job, self._positions, self._silent())

    def _silent(self) -> dict[int, float]:
        """Seconds without a heartbeat, by rank, of the other ranks that have none and have not done their part."""
        silences = {rank: self._seen[rank] - since for rank, since in self._beaten.items()}
        silences.pop(self._watch.rank, None)
        found = {rank: seconds for rank, seconds in silences.items() if seconds > GRACE_SECONDS}
        return {r: seconds for r, seconds in found.items() if _progress(self._positions[r], self._job)[1] != DONE}

    def _lost(self) -> str | None:
        """Return why the job cannot end, if a rank that had begun it is lost."""
        # A store in a launcher goes with the launcher, and rank 0 has its own: neither tells of a rank.
        depends_on_rank_0 = self._watch.rank > 0 and not launcher_has_store()
        if depends_on_rank_0 and self._store_timer.seconds > LOST_SECONDS:
            return f"{self._job.what}: {self._watch.explain_without_store()}"
        silences = {
            rank: seconds
            for rank, seconds in self._silent().items()
            if seconds > LOST_SECONDS and _progress(self._positions[rank], self._job)[1] in (WORKING, WAITING)
        }
        if not silences:
            return None
        last = "; ".join(dict.fromkeys(_progress(self._positions[rank], self._job)[2] for rank in silences))
        are = "is" if len(silences) == 1 else "are"
        return (
            f"{self._job.what}: {_name(silences, self._positions)} {are} gone, with no sign of life for "
            f"{min(silences.values()):.0f} s; last heard of: {last}"
        )


def summarize(job: Job, positions: Mapping[int, Position], silences: Mapping[int, float]) -> str:
    """Summarize the progress of the ranks on one line, those first that the others may be waiting for.

    Args:
        job: the job.
        positions: the last position by rank.
        silences: seconds without a heartbeat by rank, of the silent ones.
    """
    progress = {rank: _progress(position, job) for rank, position in positions.items()}
    silent: dict[str, list[int]] = {}
    for rank in sorted(silences):
        silent.setdefault(progress[rank][2] if len(silences) <= MAX_SHOWN_RANKS else "", []).append(rank)
    parts = []
    for place, ranks in silent.items():
        before = f" (before: {place})" if place else ""
        seconds = min(silences[rank] for rank in ranks)
        parts.append(f"{_name(ranks, positions)}: no sign of life for {seconds:.0f} s{before}")
    alike: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(positions.keys() - silences.keys()):
        _, state, place, _ = progress[rank]
        alike.setdefault((state, f"{rank}" if state == WORKING else place), []).append(rank)
    working = [rank for (state, _), (rank, *_) in alike.items() if state == WORKING]
    working.sort(key=lambda rank: (-progress[rank][3], rank))
    parts += [f"{_name([rank], positions)}: {progress[rank][2]}" for rank in working[:MAX_SHOWN_RANKS]]
    if further := sorted(working[MAX_SHOWN_RANKS:]):
        parts.append(f"{_name(further, positions)}: working as well")
    order = {ABSENT: 0, WAITING: 1, DONE: 2}
    for (state, place), ranks in sorted(alike.items(), key=lambda item: order.get(item[0][0], 0)):
        if state != WORKING:
            parts.append(f"{_name(ranks, positions)}: {place}")
    return "; ".join(parts)


def _progress(position: Position, job: Job) -> tuple[int, str, str, float]:
    """A rank's last progress in the job (`Job.published`); made up if it is in no job of the kind, or in another."""
    number, state, place, idle = (position.jobs or {}).get(job.kind, (0, ABSENT, "", 0.0))
    if number < job.number:
        return number, ABSENT, f"not begun ({position.text})", 0.0
    if number > job.number:
        return number, DONE, "done", 0.0
    return number, state, place, idle


def _name(ranks: Iterable[int], positions: Mapping[int, Position]) -> str:
    return ranks_on_hosts({rank: positions[rank].host for rank in ranks})


def _amount(done: int, total: int, unit: str) -> str:
    """`1.20 of 4.50 GB`, `3 of 80 batches`."""
    if unit:
        return f"{done:,} of {total:,} {unit}"
    size, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / size:.2f} of {total / size:.2f} {name}"
