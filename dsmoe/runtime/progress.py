"""Say every minute how far each rank is with a job that may take any time, such as writing a checkpoint.

Storage that hangs raises nothing, and the ranks that wait for a slow one have nothing to say. So every rank keeps an
account of its part of such a job, and the watch publishes it with its beats. When a job has taken a minute, rank 0
reads the accounts and logs a line, and so every further minute. Where rank 0 says nothing (its process stands still, or
its log is on the storage that hangs), rank 1 and the first rank of every other host say it instead. Nobody reads
anything of a job that ends before.
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
from dsmoe.runtime.heartbeat import Silence, within
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.reporting_rank import speaks_of_jobs
from dsmoe.runtime.watchdog import GRACE_SECONDS, STORE_SECONDS, Note, Watch, notes_in, process_watch
from dsmoe.runtime.world import launcher_has_store

logger = logging.getLogger(__name__)

WORD_SECONDS = 60.0
"""After how long a line is due, and then another one each time."""
LOOK_SECONDS = 5.0
"""Between looks at a job that takes long."""
GONE_SECONDS = 60.0
"""A rank that had begun the job is gone if its beats do not go on for so long: longer than a debugger stops one."""
LOG_SECONDS = 10.0
"""How long a line may take to get into the log: storage that hangs may have that as well."""
SHOWN_RANKS = 8
WORKING, WAITING, OVER, AWAY = "working", "waiting", "over", "away"
_NOT_BEGUN = "waiting to begin"


class Account:
    """What this rank has done of its part of a job."""

    def __init__(self) -> None:
        self._state, self._place = WAITING, _NOT_BEGUN
        self._done = self._total = 0
        self._unit = ""
        self._moved = time.monotonic()

    def at(self, place: str) -> None:
        """Say what this rank works on, such as a file."""
        self._set(WORKING, place)

    def waits(self, place: str) -> None:
        """Say for what this rank waits, or that its part is done."""
        self._set(WAITING, place)

    @property
    def says_why_it_waits(self) -> bool:
        """Whether `waits` was called after the last `at`."""
        return self._state == WAITING and self._place != _NOT_BEGUN

    def expect(self, total: int, unit: str = "") -> None:
        """Say how much there is to do, of a unit (`batches`), or else in bytes."""
        self._done, self._total, self._unit = 0, total, unit

    def add(self, amount: int) -> None:
        """Say that so much more is done; costs two assignments."""
        self._done += amount
        self._moved = time.monotonic()

    def text(self) -> tuple[str, str, float]:
        """The state, the place and amount, and for how many seconds nothing has moved."""
        place, still = self._place, time.monotonic() - self._moved
        since = "" if still < GRACE_SECONDS else f" for {still:.0f} s"
        if self._state == WORKING and self._total:
            done = f"{_amount(self._done, self._total, self._unit)}, at {place}"
            place = f"{done}, without a move{since}" if since else done
        elif self._state == WORKING:
            place += since
        return self._state, place, round(still, 1)

    def _set(self, state: str, place: str) -> None:
        self._state, self._place, self._moved = state, place, time.monotonic()


class Job(Account):
    """A part that every rank has in a job of all ranks; a context, which all of them enter in the same order.

    Where `ends_with_rank`, entering it tells the store at once: not for a thread that must not wait for it.

    Args:
        kind: of one kind there is one job at a time.
        what: what is being done, for people: `saving step_00000100`.
        ends_with_rank: whether `lost` is to be set when a rank is gone; else that is only said.
        watch: by default that of this process.
    """

    def __init__(self, kind: str, what: str, *, ends_with_rank: bool = False, watch: Watch | None = None) -> None:
        super().__init__()
        self.kind, self.what, self.ends_with_rank = kind, what, ends_with_rank
        self.lost: LostRanksError | None = None
        """Which rank is gone, while others wait for it in this job; set on ranks that look on."""
        self.ended = threading.Event()
        self._missed: float | None = None
        """Since when rank 0 is known to be missing."""
        self._watch = watch or process_watch()
        self.number = self._watch.jobs[kind].number + 1 if kind in self._watch.jobs else 1

    def __enter__(self) -> Job:
        """Publish the account from now on, and look on where this rank is to."""
        self._watch.jobs[self.kind] = self
        if self.ends_with_rank:  # only a rank that is known to have begun can be gone from it
            within(STORE_SECONDS, self._watch._publish)
        if speaks_of_jobs(self._watch.rank):
            looking = _Looking(self, self._watch)
            threading.Thread(target=looking.go_on, daemon=True, name="dsmoe job").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """This rank's part is over; its account says so until the next job of this kind."""
        self._set(OVER, "done")
        self.ended.set()
        if self.ends_with_rank:  # nobody is to take this rank, which may end now, for one that is gone
            within(STORE_SECONDS, self._watch._publish)

    def gone(self) -> LostRanksError | None:
        """Which rank is gone, so that this job has no end; for ranks that wait in it, which ask now and then.

        Ranks that do not look on themselves learn of rank 0 alone, and later: as `Watch.has_lost_first` says, and for
        `GRACE_SECONDS`, since a process that stood still itself has yet to hear of the others.
        """
        if not self._watch.has_lost_first():
            self._missed = None
        elif self._missed is None:
            self._missed = time.monotonic()
        elif self.lost is None and time.monotonic() - self._missed > GRACE_SECONDS:
            self.lost = LostRanksError(f"{self.what}: rank 0 does not come")
        return self.lost

    def account(self) -> list[Any]:
        """What the others are told: the job's number, and `text`."""
        return [self.number, *self.text()]


class _Looking:
    """What a rank that looks on at a job has seen of it, and has said."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._job, self._watch = job, watch
        self._store: dist.Store | None = None
        self._notes: dict[int, Note] = {}
        self._most = 3 * LOOK_SECONDS + LOG_SECONDS
        """More than looks are apart while this process runs."""
        self._silence_of_store = Silence(self._most)
        self._watched = 0.0
        """Seconds in which this process has looked and the store has answered: only these count against a rank."""
        self._beaten: dict[int, float] = {}
        """What `_watched` was when each rank's beats were last seen to go on."""
        self._seen: dict[int, float] = {}
        """The same, when they were last looked at."""
        self._begun = self._looked = self._line_at = time.monotonic()
        self._next_line = self._begun + WORD_SECONDS
        self._lines_key = f"dsmoe/job/{job.kind}/words"
        """The key by which rank 0 says that it has logged a line."""
        self._num_lines, self._last_line = 0, ""
        """How many lines this rank has logged, and what was last seen at the key, `_line_at`."""

    def go_on(self) -> None:
        """Look until the job is over, or a rank is gone."""
        while not self._job.ended.wait(LOOK_SECONDS):
            if time.monotonic() - self._begun < WORD_SECONDS / 2:
                continue
            if self._watch.rank == 0:
                self._look(range(self._watch.world_size))
                self._speak_if_due()
            else:
                self._look([0])
                patience = WORD_SECONDS + 2 * LOOK_SECONDS + LOG_SECONDS
                # Hosts are many, and each of them would read the notes of all ranks.
                if time.monotonic() - self._line_at > patience and time.monotonic() >= self._next_line:
                    self._look(range(self._watch.world_size))
                    self._speak_if_due()
            if self._job.ends_with_rank and (lost := self._lost()) is not None:
                self._log(lost)  # before the main thread ends the run for it
                self._job.lost = LostRanksError(lost)
                return

    def _look(self, ranks: Sequence[int]) -> None:
        """Read notes, and of rank 0 whether it speaks."""
        found = within(2 * STORE_SECONDS, lambda: self._read(ranks))
        self._silence_of_store.look(found is not None)
        since, self._looked = self._looked, time.monotonic()
        if found is None:
            self._store = None  # another connection next time
            return
        notes, line = found
        if line != self._last_line:
            self._last_line, self._line_at = line, time.monotonic()
        self._watched += min(self._looked - since, self._most)
        for rank, note in notes.items():
            if rank not in self._notes or note.beat != self._notes[rank].beat:
                self._beaten[rank] = self._watched
            self._seen[rank] = self._watched
        self._notes |= notes

    def _read(self, ranks: Sequence[int]) -> tuple[dict[int, Note], str]:
        if self._store is None:
            self._store = self._watch.store.clone()
        store, key = self._store, self._lines_key
        line = store.get(key).decode() if store.check([key]) else ""
        return notes_in(store, ranks), line

    def _speak_if_due(self) -> None:
        """Log a line if it is time to, and let the others know that this was possible."""
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + WORD_SECONDS
        line = f"{self._job.what} has taken {now - self._begun:.0f} s so far. {self._places()}"
        if self._log(line) and self._watch.rank == 0:
            self._num_lines += 1
            store, said = self._store, f"{self._job.number} {self._num_lines}"
            if store is not None:
                within(STORE_SECONDS, lambda: store.set(self._lines_key, said))

    def _log(self, line: str) -> bool:
        """Whether the line is in the log; the console has it before a file on storage that hangs."""
        level = logging.WARNING if self._watch.rank == 0 else logging.ERROR  # the console of other ranks has no less

        def log() -> bool:
            logger.log(level, "%s", line)
            return True

        return within(LOG_SECONDS, log) is not None

    def _places(self) -> str:
        """How far the ranks are, as far as this one knows."""
        if self._silence_of_store.seconds > GRACE_SECONDS:
            own = self._watch.now()[0]
            notes = {self._watch.rank: replace(own, jobs={self._job.kind: self._job.account()})}
            return f"{self._watch.without_store()}; {places(self._job, notes, {})}"
        return places(self._job, self._notes, self._silent())

    def _silent(self) -> dict[int, float]:
        """For how long other ranks have given no sign of life, of those whose beats do not go on."""
        silences = {rank: self._seen[rank] - since for rank, since in self._beaten.items()}
        silences.pop(self._watch.rank, None)
        found = {rank: seconds for rank, seconds in silences.items() if seconds > GRACE_SECONDS}
        return {r: seconds for r, seconds in found.items() if _account(self._notes[r], self._job)[1] != OVER}

    def _lost(self) -> str | None:
        """Why the job will not come to an end, if a rank that had begun it is gone."""
        # A store in a launcher goes with the launcher, and rank 0 has its own: neither tells of a rank.
        of_rank_0 = self._watch.rank > 0 and not launcher_has_store()
        if of_rank_0 and self._silence_of_store.seconds > GONE_SECONDS:
            return f"{self._job.what}: {self._watch.without_store()}"
        silences = {
            rank: seconds
            for rank, seconds in self._silent().items()
            if seconds > GONE_SECONDS and _account(self._notes[rank], self._job)[1] in (WORKING, WAITING)
        }
        if not silences:
            return None
        last = "; ".join(dict.fromkeys(_account(self._notes[rank], self._job)[2] for rank in silences))
        are = "is" if len(silences) == 1 else "are"
        return (
            f"{self._job.what}: {_who(silences, self._notes)} {are} gone, with no sign of life for "
            f"{min(silences.values()):.0f} s; last heard of: {last}"
        )


def places(job: Job, notes: Mapping[int, Note], silences: Mapping[int, float]) -> str:
    """How far the ranks are, those first that the others may be waiting for.

    Args:
        job: of which job.
        notes: by rank, its last note.
        silences: by rank, for how many seconds its beats have not gone on.
    """
    accounts = {rank: _account(note, job) for rank, note in notes.items()}
    silent: dict[str, list[int]] = {}
    for rank in sorted(silences):
        silent.setdefault(accounts[rank][2] if len(silences) <= SHOWN_RANKS else "", []).append(rank)
    parts = []
    for place, ranks in silent.items():
        before = f" (before: {place})" if place else ""
        parts.append(f"{_who(ranks, notes)}: no sign of life for {min(silences[rank] for rank in ranks):.0f} s{before}")
    alike: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(notes.keys() - silences.keys()):
        _, state, place, _ = accounts[rank]
        alike.setdefault((state, f"{rank}" if state == WORKING else place), []).append(rank)
    working = [rank for (state, _), (rank, *_) in alike.items() if state == WORKING]
    working.sort(key=lambda rank: (-accounts[rank][3], rank))
    parts += [f"{_who([rank], notes)}: {accounts[rank][2]}" for rank in working[:SHOWN_RANKS]]
    if further := sorted(working[SHOWN_RANKS:]):
        parts.append(f"{_who(further, notes)}: working as well")
    order = {AWAY: 0, WAITING: 1, OVER: 2}
    for (state, place), ranks in sorted(alike.items(), key=lambda item: order.get(item[0][0], 0)):
        if state != WORKING:
            parts.append(f"{_who(ranks, notes)}: {place}")
    return "; ".join(parts)


def _account(note: Note, job: Job) -> tuple[int, str, str, float]:
    """A rank's last account of the job; made up where it has none, or one of another job of the kind."""
    number, state, place, still = (note.jobs or {}).get(job.kind, (0, AWAY, "", 0.0))
    if number < job.number:
        return number, AWAY, f"not begun ({note.place})", 0.0
    if number > job.number:
        return number, OVER, "done", 0.0
    return number, state, place, still


def _who(ranks: Iterable[int], notes: Mapping[int, Note]) -> str:
    return ranks_on_hosts({rank: notes[rank].host for rank in ranks})


def _amount(done: int, total: int, unit: str) -> str:
    """`1.20 of 4.50 GB`, `3 of 80 batches`."""
    if unit:
        return f"{done:,} of {total:,} {unit}"
    size, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / size:.2f} of {total / size:.2f} {name}"
