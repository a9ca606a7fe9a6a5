"""Watchdog: record each rank's position and name the missing ranks when a collective fails.

A collective that fails knows its own side only: a connection was reset, or time ran out. So each rank records what it
is about to do (an assignment), and a thread publishes that in the store every `HEARTBEAT_SECONDS`. After a failure the
rank that reports it reads the store: a rank whose heartbeat has stopped is gone, and among the living the one that has
recorded the fewest positions is the one the others wait for. All ranks record the same positions in the same order, so
their number says how far a rank is.

There is one `Watchdog` per process, as there is one default store and one main thread.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from dsmoe.plan.text import ranks_on_hosts
from dsmoe.runtime.heartbeat import HeartbeatTimer, call_with_timeout
from dsmoe.runtime.lost_ranks import LostRanksError, first_line, is_lost_rank_error
from dsmoe.runtime.rendezvous import ENDED, Rendezvous, probe_store
from dsmoe.runtime.world import launcher_has_store

HEARTBEAT_SECONDS = 2.0
"""The interval at which each rank publishes its position."""
GRACE_SECONDS = 3 * HEARTBEAT_SECONDS
"""A rank without a heartbeat for this long is gone."""
STORE_SECONDS = 10.0
"""Timeout of the store, which is in another process and perhaps on a host that cannot be reached."""

FIRST_FAILED_KEY = "dsmoe/failed"
"""The store's key of the first failed rank."""
REPORT_REQUESTS_KEY = "dsmoe/asked"
"""The store's key of the number of requests for reports."""
EXPLAINED_KEY = "dsmoe/explained"
"""The store's key that exists once a rank has explained why the run ends."""
MAX_SHOWN = 8
"""The most positions that a message names."""
SAVING = "saving a checkpoint"
"""An activity without a stall timeout: its duration depends on the storage."""


class Reporter(Protocol):
    """The writer of this rank's reports (`dsmoe.runtime.failure_reports`)."""

    def on_heartbeat(self) -> None:
        """Called at every heartbeat."""

    def write(self, why: str) -> None:
        """Write a report."""

    def write_failure(self, why: str, error: BaseException | None = None) -> None:
        """Write a report of this rank's first failure; ignore later ones."""

    def gather(self, explanation: str) -> str:
        """Wait for the other ranks' reports and return a summary."""


@dataclass(frozen=True)
class Position:
    """The position of a rank, as published at a heartbeat."""

    host: str
    heartbeat: int = 0
    """The number of heartbeats so far."""
    count: int = 0
    """The number of positions recorded so far."""
    step: int = 0
    activity: str = "starting"
    failed: bool = False
    jobs: dict[str, list[Any]] | None = None
    """`Job.published()` of `dsmoe.runtime.progress`, by the job's kind."""

    @property
    def text(self) -> str:
        """Step and activity, for messages."""
        return f"step {self.step}, {self.activity}" if self.step else self.activity


class Watchdog:
    """This rank's position, and the positions of the other ranks in the store.

    Args:
        store: any store that all ranks share; clones are used, since a store serves one thread at a time.
        rank: this rank.
        world_size: the number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._heartbeat_store, self.store = store.clone(), store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        for clone in (self._heartbeat_store, self.store):
            clone.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._published = Position(socket.gethostname())
        self._recorded: tuple[int, int, str, float] = (0, 0, "starting", time.monotonic())
        """Count, step, activity and time of the last position: one tuple, so that threads see all four or none."""
        self.reports: Reporter | None = None
        """Called when another rank has failed, or any was asked for reports."""
        self.jobs: dict[str, Any] = {}
        """The `Job` of `dsmoe.runtime.progress` whose progress is published, by kind."""
        self._report_requested, self._requests_seen = False, 0
        self.timeout = timedelta(minutes=30)
        """The time after which ranks that this one waits for count as missing."""
        self.agreed: dict[tuple[int, ...], set[str]] = {}
        """The shapes that `dsmoe.parallel.shape_check` has compared, by group of ranks."""
        self.first_failed: int | None = None
        """The first failed rank, as far as known to this one."""
        self._num_waits = 0
        self._rank_0, self._rank_0_seen = Position("an unknown host"), time.monotonic()
        self._rank_0_timer, self._rank_0_heartbeat = HeartbeatTimer(GRACE_SECONDS), 0
        self._failed = self._store_has_ended = False
        self._store_answers = True
        self._publishing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat_loop, daemon=True, name="dsmoe watchdog")
        self._thread.start()

    def record(self, activity: str, step: int | None = None) -> None:
        """Record what this rank is about to do; costs an assignment, so it may precede every collective."""
        count, last_step, _, _ = self._recorded
        self._recorded = (count + 1, last_step if step is None else step, activity, time.monotonic())

    def describe(self, activity: str) -> None:
        """Refine the text of the current position, which does not count: other ranks do not record the same."""
        count, step, _, since = self._recorded
        self._recorded = (count, step, activity, since)

    def next_wait_number(self) -> int:
        """Return the number of this wait; all ranks begin waits in the same order (`dsmoe.runtime.waiting`)."""
        self._num_waits += 1
        return self._num_waits

    def position(self) -> tuple[Position, float]:
        """Return the last recorded position and its age in seconds."""
        count, step, activity, since = self._recorded
        position = replace(self._published, count=count, step=step, activity=activity, failed=self._failed)
        return position, time.monotonic() - since

    def request_reports(self) -> None:
        """Make all other ranks write reports, within two heartbeats."""
        self._report_requested = True

    def watch_for_stalls(self, action: Callable[[LostRanksError], None]) -> None:
        """Call `action`, in a thread, if no position is recorded within a step for `timeout` plus a heartbeat.

        For CUDA, where a collective that hangs raises nothing: the host waits for the device, and NCCL's own watchdog
        ends the process without a message of ours. Time before the first step and while saving does not count. If the
        store has ended, and rank 0 with it, the stall is certain, and `timeout` is not waited for.
        """
        threading.Thread(target=self._detect_stalls, args=(action,), daemon=True, name="dsmoe stalls").start()

    def has_lost_rank_0(self) -> bool:
        """Return whether rank 0 is gone: its store has ended, or its heartbeat is missing for longer than allowed.

        Time counts only between repeated calls (`HeartbeatTimer`).
        """
        if self.rank == 0:
            return False
        heartbeat = self._rank_0.heartbeat
        silence = self._rank_0_timer.update(heartbeat != self._rank_0_heartbeat)
        self._rank_0_heartbeat = heartbeat
        return (self._store_has_ended and not launcher_has_store()) or silence > self._rank_0_limit()

    def _rank_0_limit(self) -> float:
        """Seconds without a heartbeat after which rank 0 is gone: `timeout`, which may be shorter than a heartbeat."""
        return self.timeout.total_seconds() + 2 * HEARTBEAT_SECONDS

    def check_others(self) -> None:
        """Check the ranks that this one waits for, perhaps through others.

        Raises:
            LostRanksError: one has failed, or rank 0 is gone.
        """
        if self.first_failed not in (None, self.rank):
            raise LostRanksError(f"rank {self.first_failed} has failed")
        if self.has_lost_rank_0():
            silence = self._rank_0_timer.seconds
            raise LostRanksError(
                f"rank 0 has given no sign of life for {silence:.0f} s"
                if silence > self._rank_0_limit()
                else "rank 0 has ended, with the store"
            )

    def check_store(self) -> None:
        """Find out now whether the store has ended."""
        self._store_has_ended = probe_store() is ENDED

    @property
    def count(self) -> int:
        """The number of positions that this rank has recorded."""
        return self._recorded[0]

    def stop(self) -> None:
        """Publish the last position and end the heartbeat."""
        self._stopped.set()
        self._thread.join(STORE_SECONDS)
        if not self._thread.is_alive():
            call_with_timeout(STORE_SECONDS, self._publish)

    def positions_of(self, ranks: Iterable[int]) -> dict[int, Position]:
        """Return the last published position by rank, without the ranks that have published none."""
        return read_positions(self.store, ranks)

    def announce_failure(self) -> int | None:
        """Announce that this rank has failed; returns the first failed rank, None if it cannot be known."""
        # Ranks 5 and 2 fail at the same moment and both ask the store to set the key from "" to their number. The store
        # serves one at a time, rank 5 first, say:
        #   rank 5: compare_set(key, "", "5") -> "5"    the key was unset: rank 5 is the first, and explains the failure
        #   rank 2: compare_set(key, "", "2") -> "5"    the key was set: rank 2 only says that rank 5 did
        #   others: learn of rank 5 at their next heartbeat
        self._failed = True

        def ask() -> int:
            self._publish()
            return int(self.store.compare_set(FIRST_FAILED_KEY, "", str(self.rank)).decode())

        first = call_with_timeout(STORE_SECONDS, ask)
        self._store_answers = first is not None
        return self.first_failed if first is None else first

    def explain(self, error: BaseException) -> str | None:
        """Name the missing ranks if `error` is a collective's that has lost one, else None; takes `GRACE_SECONDS`."""
        if not is_lost_rank_error(error):
            return None
        own, _ = self.position()
        missing = None
        if self._store_answers:
            missing = call_with_timeout(STORE_SECONDS + GRACE_SECONDS, lambda: self._missing_ranks(own))
        missing = missing or self.explain_without_store()
        return f"a collective failed at {own.text}: {missing} ({first_line(error)})"

    def announce_explained(self) -> None:
        """Announce that the failure has been explained; rank 0, which has the store, stays until the others know."""
        if self._store_answers:
            call_with_timeout(STORE_SECONDS, lambda: self.store.set(EXPLAINED_KEY, ""))
        if self.rank == 0 and self.world_size > 1:
            time.sleep(GRACE_SECONDS)

    def wait_until_explained(self, seconds: float) -> None:
        """Wait until the first failed rank has explained the failure, `seconds` at most."""
        deadline = time.monotonic() + seconds
        while self._store_answers and time.monotonic() < deadline:
            if call_with_timeout(STORE_SECONDS, lambda: self.store.check([EXPLAINED_KEY])) is not False:
                return  # explained, or the store has gone with rank 0
            time.sleep(1)

    def _missing_ranks(self, own: Position) -> str:
        """Describe the ranks that are gone, or else those furthest behind."""
        # Four ranks, rank 0 asks; heartbeat numbers before and after GRACE_SECONDS, and counts of positions:
        #   rank 1  heartbeat 40 -> 43  count 12       alive
        #   rank 2  heartbeat 38 -> 38  count 12       gone: "rank 2 on host1 is gone"
        #   rank 3  heartbeat 39 -> 42  count 11       alive
        # Were rank 2 alive: counts are 12 (own), 12, 12, 11, and rank 3 is missing, "alive, but still at" its position.
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = self.positions_of(others)
        timer = HeartbeatTimer(HEARTBEAT_SECONDS)
        while timer.update() < GRACE_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 4)
        after = self.positions_of(others)
        unknown = Position("an unknown host", activity="before it had joined the others")
        latest = {rank: after.get(rank, unknown) for rank in others}
        gone = {
            rank: position
            for rank, position in latest.items()
            if not position.failed and position.heartbeat == before.get(rank, unknown).heartbeat
        }
        if gone:
            last = f"last heard of: {_texts(gone)}"
            return f"{_ranks_are(gone)} gone, with no sign of life for {timer.seconds:.0f} s; {last}"
        latest[self.rank] = own
        least = min(position.count for position in latest.values())
        if least == max(position.count for position in latest.values()):
            return "no rank is missing: all are alive and have come equally far"
        behind = {rank: position for rank, position in latest.items() if position.count == least}
        return f"{_ranks_are(behind)} missing: alive, but still at {_texts(behind)}"

    def explain_without_store(self) -> str:
        """Describe the state of rank 0, or of the launcher, whichever has the store that does not answer.

        Takes up to `CONNECT_SECONDS` of `dsmoe.runtime.rendezvous`.
        """
        state, serves_itself = probe_store(), not launcher_has_store()
        address = f"at {Rendezvous.from_environment().endpoint}, where the ranks meet"
        own, _ = self.position()
        rank_0, seconds = (self._rank_0, time.monotonic() - self._rank_0_seen) if self.rank else (own, 0.0)
        who = f"rank 0 on {rank_0.host}" if serves_itself else f"the launcher on rank 0's host ({rank_0.host})"
        last = f"; last heard of rank 0, {seconds:.0f} s ago: {rank_0.text}" if self.rank else ""
        if state is None:
            return f"rank 0's host does not answer {address}: it has ended, or {own.host} is cut off from it{last}"
        return f"{who} {state} {address}{last}"

    def _heartbeat_loop(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS if self._published.heartbeat else 0.0):
            try:
                self._publish()
                self._read_failure_and_rank_0()
                self._relay_report_requests()
            except Exception:  # the main thread will find out, if it still needs the store, and say so
                self.check_store()
                if not self._store_has_ended:
                    with suppress(Exception):
                        self._heartbeat_store = self.store.clone()

    def _read_failure_and_rank_0(self) -> None:
        """Read the first failed rank and rank 0's position from the store."""
        if self.first_failed is None and self._heartbeat_store.check([FIRST_FAILED_KEY]):
            self.first_failed = int(self._heartbeat_store.get(FIRST_FAILED_KEY).decode())
            if self.reports and self.first_failed != self.rank:
                self.reports.write_failure(f"rank {self.first_failed} has failed")
        if self.rank > 0 and self._heartbeat_store.check([_key(0)]):
            rank_0 = Position(**json.loads(self._heartbeat_store.get(_key(0))))
            if rank_0.heartbeat != self._rank_0.heartbeat:
                self._rank_0, self._rank_0_seen = rank_0, time.monotonic()

    def _detect_stalls(self, action: Callable[[LostRanksError], None]) -> None:
        last, timer = -1, HeartbeatTimer(GRACE_SECONDS)
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            count, step, activity, _ = self._recorded
            stalled = timer.update(count != last or step == 0 or activity == SAVING)
            last = count
            if stalled > self.timeout.total_seconds() + HEARTBEAT_SECONDS:
                return action(LostRanksError(f"nothing has gone on for {stalled:.0f} s"))
            if self._store_has_ended and not launcher_has_store() and stalled > GRACE_SECONDS:
                return action(LostRanksError("nothing goes on, and the store has ended"))

    def _relay_report_requests(self) -> None:
        """Publish a request for reports made to this rank, and write a report if one was made to another rank."""
        if self.reports:
            self.reports.on_heartbeat()
        own_requests, self._report_requested = self._report_requested, False
        requests = self._heartbeat_store.add(REPORT_REQUESTS_KEY, int(own_requests))
        if self.reports and requests - own_requests > self._requests_seen:
            self.reports.write("another rank was asked to")
        self._requests_seen = requests

    def _publish(self) -> None:
        with self._publishing:
            position, _ = self.position()
            jobs = {kind: job.published() for kind, job in list(self.jobs.items())}
            self._published = replace(position, heartbeat=position.heartbeat + 1, jobs=jobs)
            self._heartbeat_store.set(_key(self.rank), json.dumps(asdict(self._published)))


_watchdogs: dict[int, tuple[dist.Store, Watchdog]] = {}
"""The watchdog of this process with its default store, by the store's id; at most one."""


def process_watchdog() -> Watchdog:
    """Return this process' watchdog, which the first call starts; the processes must have joined."""
    store = dist.distributed_c10d._get_default_store()
    if id(store) not in _watchdogs:
        _watchdogs.clear()
        _watchdogs[id(store)] = (store, Watchdog(store, dist.get_rank(), dist.get_world_size()))
    return _watchdogs[id(store)][1]


def record_position(activity: str) -> None:
    """Call `Watchdog.record` of this process' watchdog, if the processes have joined."""
    if dist.is_initialized():
        process_watchdog().record(activity)


def stop_watching() -> None:
    """End this process' watchdog, if there is one; before the process groups are destroyed."""
    for _, watchdog in _watchdogs.values():
        watchdog.stop()
    _watchdogs.clear()


def read_positions(store: dist.Store, ranks: Iterable[int]) -> dict[int, Position]:
    """Return the last position in `store` by rank: two requests, unless some ranks have published none."""
    keys = {rank: _key(rank) for rank in ranks}
    if keys and not store.check(list(keys.values())):
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    texts = store.multi_get(list(keys.values())) if keys else []
    return {rank: Position(**json.loads(text)) for rank, text in zip(keys, texts, strict=True)}


def _key(rank: int) -> str:
    return f"dsmoe/watch/{rank}"


def _ranks_are(positions: Mapping[int, Position]) -> str:
    """`ranks 2-3 on host1 are`."""
    hosts = {rank: position.host for rank, position in positions.items()}
    return f"{ranks_on_hosts(hosts)} {'is' if len(hosts) == 1 else 'are'}"


def _texts(positions: Mapping[int, Position]) -> str:
    texts = list(dict.fromkeys(position.text for _, position in sorted(positions.items())))
    return "; ".join([*texts[:MAX_SHOWN], *(["..."] if len(texts) > MAX_SHOWN else [])])
