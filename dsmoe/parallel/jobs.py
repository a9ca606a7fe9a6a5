"""Say every minute how far each rank is with a job that may take any time, such as writing a checkpoint.

Storage that hangs raises nothing, and the ranks that wait for a slow one have nothing to say. So every rank keeps an
account of its part of such a job, and the watch publishes it with its beats. When a job has taken a minute, rank 0
reads the accounts and logs a line, and so every further minute. Where rank 0 says nothing (its process stands still, or
its log is on the storage that hangs), rank 1 and the first rank of every other host say it instead. Nobody reads
anything of a job that ends before.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from dsmoe.launch.world import launcher_has_store
from dsmoe.parallel.lost import LostRanksError
from dsmoe.parallel.watch import GRACE_SECONDS, STORE_SECONDS, Note, Watch, notes_in, process_watch, within
from dsmoe.plan.text import rank_names

T = TypeVar("T")

logger = logging.getLogger(__name__)

WORD_SECONDS = 60.0
"""After how long a line is due, and then another one each time."""
LOOK_SECONDS = 5.0
"""Between looks at a job that takes long."""
GONE_SECONDS = 60.0
"""A rank that had begun the job is gone if its beats do not go on for so long: longer than a debugger stops one."""
LOG_SECONDS = 10.0
"""How long a line may take to get into the log: storage that hangs may have that as well."""
SHOWN_RANKS, SHOWN_HOSTS, LONGEST_NAMES = 8, 3, 80
WORKING, WAITING, OVER, AWAY = "working", "waiting", "over", "away"


class Account:
    """What this rank has done of its part of a job."""

    def __init__(self) -> None:
        self._state, self._place = WAITING, "waiting to begin"
        self._done = self._total = 0
        self._unit = ""
        self._moved = time.monotonic()

    def at(self, place: str) -> None:
        """Say what this rank works on, such as a file."""
        self._set(WORKING, place)

    def waits(self, place: str) -> None:
        """Say for what this rank waits, or that its part is done."""
        self._set(WAITING, place)

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
        if self._watch.rank < 2 or os.environ.get("LOCAL_RANK") == "0":
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


def while_ranks_live(job: Job, action: Callable[[], T]) -> T:
    """Do what waits for other ranks without a limit in a thread; returns what it does, and raises what it raises.

    Raises:
        LostRanksError: a rank is gone, by `Job.gone`; the thread is left alone.
    """
    results, errors = list[T](), list[BaseException]()

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, daemon=True, name=f"dsmoe {job.kind}")
    thread.start()
    while thread.is_alive():
        if (lost := job.gone()) is not None:
            raise lost
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]


class _Looking:
    """What a rank that looks on at a job has seen of it, and has said."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._job, self._watch = job, watch
        self._store: dist.Store | None = None
        self._notes: dict[int, Note] = {}
        self._beaten: dict[int, float] = {}
        """When each rank's beats were last seen to go on."""
        self._seen: dict[int, float] = {}
        """When each rank's beats were last looked at."""
        self._begun = self._looked = self._answered = time.monotonic()
        self._next_word = self._begun + WORD_SECONDS
        self._spoken = f"dsmoe/job/{job.kind}/words"
        """The key by which rank 0 says that it has logged a line."""
        self._words, self._heard, self._heard_at = 0, "", self._begun

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
                if time.monotonic() - self._heard_at > patience and time.monotonic() >= self._next_word:
                    self._look(range(self._watch.world_size))
                    self._speak_if_due()
            if self._job.ends_with_rank and (lost := self._lost()) is not None:
                self._log(lost)  # before the main thread ends the run for it
                self._job.lost = LostRanksError(lost)
                return

    def _look(self, ranks: Sequence[int]) -> None:
        """Read notes, and of rank 0 whether it speaks."""
        now = time.monotonic()
        if now - self._looked > 3 * LOOK_SECONDS + LOG_SECONDS:  # it is this process that stood still
            self._beaten.clear()
            self._answered = now
        found = within(2 * STORE_SECONDS, lambda: self._read(ranks))
        self._looked = now = time.monotonic()
        if found is None:
            self._store = None  # another connection next time
            return
        self._answered = now
        notes, heard = found
        if heard != self._heard:
            self._heard, self._heard_at = heard, now
        for rank, note in notes.items():
            if rank not in self._beaten or note.beat != self._notes[rank].beat:
                self._beaten[rank] = now
            self._seen[rank] = now
        self._notes |= notes

    def _read(self, ranks: Sequence[int]) -> tuple[dict[int, Note], str]:
        if self._store is None:
            self._store = self._watch.store.clone()
        store, spoken = self._store, self._spoken
        heard = store.get(spoken).decode() if store.check([spoken]) else ""
        return notes_in(store, ranks), heard

    def _speak_if_due(self) -> None:
        """Log a line if it is time to, and let the others know that this was possible."""
        now = time.monotonic()
        if now < self._next_word:
            return
        self._next_word = now + WORD_SECONDS
        line = f"{self._job.what} has taken {now - self._begun:.0f} s so far. {self._places()}"
        if self._log(line) and self._watch.rank == 0:
            self._words += 1
            store, words = self._store, f"{self._job.number} {self._words}"
            if store is not None:
                within(STORE_SECONDS, lambda: store.set(self._spoken, words))

    def _log(self, line: str) -> bool:
        """Whether the line is in the log; the console has it before a file on storage that hangs."""
        level = logging.WARNING if self._watch.rank == 0 else logging.ERROR  # the console of other ranks has no less

        def log() -> bool:
            logger.log(level, "%s", line)
            return True

        return within(LOG_SECONDS, log) is not None

    def _places(self) -> str:
        """How far the ranks are, as far as is known here."""
        if self._silent_store() > GRACE_SECONDS:
            here = self._watch.now()[0]
            notes = {self._watch.rank: replace(here, jobs={self._job.kind: self._job.account()})}
            return f"{self._no_store()}; {places(self._job, notes, {})}"
        known = {rank: note for rank, note in self._notes.items() if rank in self._beaten}
        return places(self._job, known, self._silences())

    def _silences(self) -> dict[int, float]:
        """For how long other ranks have given no sign of life, of those whose beats do not go on."""
        silences = {rank: self._seen[rank] - since for rank, since in self._beaten.items()}
        silences.pop(self._watch.rank, None)
        silent = {rank: seconds for rank, seconds in silences.items() if seconds > GRACE_SECONDS}
        return {r: seconds for r, seconds in silent.items() if _account(self._notes[r], self._job)[1] != OVER}

    def _silent_store(self) -> float:
        return time.monotonic() - self._answered

    def _no_store(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        silent = f"rank 0's host does not answer at {address}, where the ranks meet"
        return f"{silent}, for {self._silent_store():.0f} s"

    def _lost(self) -> str | None:
        """Why the job will not come to an end, if a rank that had begun it is gone."""
        # A store in a launcher goes with the launcher, and rank 0 has its own: neither tells of a rank.
        of_rank_0 = self._watch.rank > 0 and not launcher_has_store()
        if of_rank_0 and self._silent_store() > GONE_SECONDS:
            return f"{self._job.what}: {self._no_store()}: it has ended, or is cut off from here"
        gone = {
            rank: self._notes[rank]
            for rank, seconds in self._silences().items()
            if seconds > GONE_SECONDS and _account(self._notes[rank], self._job)[1] in (WORKING, WAITING)
        }
        if not gone:
            return None
        last = "; ".join(dict.fromkeys(_account(note, self._job)[2] for note in gone.values()))
        is_or_are = "is" if len(gone) == 1 else "are"
        return (
            f"{self._job.what}: {_who(sorted(gone), gone)} {is_or_are} gone, with no sign of life for "
            f"{GONE_SECONDS:.0f} s; last heard of: {last}"
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


def _who(ranks: Sequence[int], notes: Mapping[int, Note]) -> str:
    """`ranks 0-2, 5 on host1, host2`."""
    names = rank_names(ranks)
    if len(names) > LONGEST_NAMES:
        names = f"{len(ranks):,} ranks from {ranks[0]} to {ranks[-1]}"
    hosts = list(dict.fromkeys(notes[rank].host for rank in ranks))
    more = f" and {len(hosts) - SHOWN_HOSTS} more hosts" if len(hosts) > SHOWN_HOSTS else ""
    return f"{names} on {', '.join(hosts[:SHOWN_HOSTS])}{more}"


def _amount(done: int, total: int, unit: str) -> str:
    """`1.20 of 4.50 GB`, `3 of 80 batches`."""
    if unit:
        return f"{done:,} of {total:,} {unit}"
    size, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / size:.2f} of {total / size:.2f} {name}"
