"""Where every rank is, so that a collective that fails can say which ranks are missing.

A collective that fails knows only its own side of it: a connection was reset, or time ran out. So each rank notes what
it does (an assignment), a thread tells the store every `BEAT_SECONDS`, and after a failure whoever speaks for the run
looks in the store: a rank whose beats have stopped is gone, and of the living the one that has come least far is the
one that the others wait for. All ranks note the same things in the same order, so the number of notes is how far.

There is one `Watch` per process, as there is one default store and one main thread.
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
from dsmoe.runtime.heartbeat import Silence, within
from dsmoe.runtime.lost_ranks import LostRanksError, first_line, is_lost
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.world import launcher_has_store

BEAT_SECONDS = 2.0
GRACE_SECONDS = 3 * BEAT_SECONDS
"""A rank whose beats do not go on for so long is gone."""
STORE_SECONDS = 10.0
"""How long the store may take to answer, which is in another process and perhaps on a host that is cut off."""

FAILED = "dsmoe/failed"
"""The key of the first rank that failed."""
ASKED = "dsmoe/asked"
"""The key of how often a rank was asked for reports."""
EXPLAINED = "dsmoe/explained"
"""The key that is there when the run's end has been explained."""
SHOWN = 8
"""The most places that a message names."""
SAVING = "saving a checkpoint"
"""A note that is not timed: how long it takes depends on the storage."""


class Reporter(Protocol):
    """Who writes down where this rank stands; see `dsmoe.runtime.failure_reports`."""

    def beat(self) -> None:
        """Called at every beat."""

    def write(self, why: str) -> None:
        """Write a report."""

    def of_failure(self, why: str, error: BaseException | None = None) -> None:
        """Write one of a failure, if it is the first."""

    def gather(self, explanation: str) -> str:
        """Wait for the other ranks' reports, and sum them up."""


@dataclass(frozen=True)
class Note:
    """What a rank does: its host, how many notes it has made, the step, what, whether it has failed, and its jobs."""

    host: str
    beat: int = 0
    notes: int = 0
    step: int = 0
    doing: str = "starting"
    failed: bool = False
    jobs: dict[str, list[Any]] | None = None
    """By kind, the accounts of `dsmoe.runtime.progress`."""

    @property
    def place(self) -> str:
        """Step and what, for people."""
        return f"step {self.step}, {self.doing}" if self.step else self.doing


class Watch:
    """This rank's notes, and what the store knows of the others'.

    Args:
        store: any store that all ranks share; clones of it are used, since a store serves one thread at a time.
        rank: this rank.
        world_size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._beats, self.store = store.clone(), store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        for clone in (self._beats, self.store):
            clone.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._now = Note(socket.gethostname())
        self._doing: tuple[int, int, str, float] = (0, 0, "starting", time.monotonic())
        self.reports: Reporter | None = None
        """Told when another rank has failed, or any was asked for reports."""
        self.jobs: dict[str, Any] = {}
        """By kind, the `Job` of `dsmoe.runtime.progress` whose account is published."""
        self._asked, self._answered = False, 0
        self.timeout = timedelta(minutes=30)
        """How long this rank waits for others before it calls them missing."""
        self.agreed: dict[tuple[int, ...], set[str]] = {}
        """By group of ranks, what `dsmoe.parallel.shape_check` has seen them agree on."""
        self.first_failed: int | None = None
        """The rank that has failed first, as far as this one has heard."""
        self._waits = 0
        self._first, self._first_seen = Note("an unknown host"), time.monotonic()
        self._first_silence, self._first_beat = Silence(GRACE_SECONDS), 0
        self._failed = self._store_has_ended = False
        self._store_answers = True
        self._publishing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._publish_for_ever, daemon=True, name="dsmoe watch")
        self._thread.start()

    def note(self, doing: str, step: int | None = None) -> None:
        """Say what this rank is about to do; costs an assignment, so it may stand before every collective."""
        notes, last_step, _, _ = self._doing
        self._doing = (notes + 1, last_step if step is None else step, doing, time.monotonic())

    def say(self, doing: str) -> None:
        """Say more of what this rank is doing: no other rank says the same, so that it does not count as a note."""
        notes, step, _, since = self._doing
        self._doing = (notes, step, doing, since)

    def count_wait(self) -> int:
        """The number of this wait, which all ranks begin in the same order (`dsmoe.runtime.waiting`)."""
        self._waits += 1
        return self._waits

    def now(self) -> tuple[Note, float]:
        """The last note, and how many seconds ago it was made."""
        notes, step, doing, since = self._doing
        note = replace(self._now, notes=notes, step=step, doing=doing, failed=self._failed)
        return note, time.monotonic() - since

    def ask_for_reports(self) -> None:
        """Let all other ranks write reports, within two beats."""
        self._asked = True

    def end_stalls(self, action: Callable[[LostRanksError], None]) -> None:
        """Call `action`, in the watch's thread, if no note is made within a step for `timeout` and a little more.

        For CUDA, where a collective that hangs raises nothing: the host waits for the device, and NCCL's own watchdog
        ends the process without a word of ours. Before the first step, and while saving, time does not count. Where the
        store has ended, and rank 0 with it, nothing will come: `timeout` is not waited for then.
        """
        threading.Thread(target=self._look_for_stalls, args=(action,), daemon=True, name="dsmoe stalls").start()

    def has_lost_first(self) -> bool:
        """Whether rank 0 will not come any more: it has ended, with the store, or is silent for longer than allowed.

        Time counts while this is asked again and again.
        """
        if self.rank == 0:
            return False
        beat = self._first.beat
        silence = self._first_silence.look(beat != self._first_beat)
        self._first_beat = beat
        return (self._store_has_ended and not launcher_has_store()) or silence > self._patience()

    def _patience(self) -> float:
        """Seconds of silence after which rank 0 is gone: a collective's limit, which may be shorter than a beat."""
        return self.timeout.total_seconds() + 2 * BEAT_SECONDS

    def check_others(self) -> None:
        """Raise LostRanksError if a rank that this one waits for, perhaps through others, will not come any more."""
        if self.first_failed not in (None, self.rank):
            raise LostRanksError(f"rank {self.first_failed} has failed")
        if self.has_lost_first():
            silence = self._first_silence.seconds
            silent = silence > self._patience()
            raise LostRanksError(
                f"rank 0 has given no sign of life for {silence:.0f} s"
                if silent
                else "rank 0 has ended, with the store"
            )

    def look_at_store(self) -> None:
        """Learn now whether the store has ended."""
        self._store_has_ended = meeting_place() is ENDED

    @property
    def notes(self) -> int:
        """How many notes this rank has made."""
        return self._doing[0]

    def stop(self) -> None:
        """Publish a last time what this rank has done, and no more."""
        self._stopped.set()
        self._thread.join(STORE_SECONDS)
        if not self._thread.is_alive():
            within(STORE_SECONDS, self._publish)

    def notes_of(self, ranks: Iterable[int]) -> dict[int, Note]:
        """What the ranks have last published; those that never have are left out."""
        return notes_in(self.store, ranks)

    def speaker(self) -> int | None:
        """Tell the others that this rank has failed, and learn which was the first to do so; None if none can say."""
        self._failed = True

        def ask() -> int:
            self._publish()
            return int(self.store.compare_set(FAILED, "", str(self.rank)).decode())

        first = within(STORE_SECONDS, ask)
        self._store_answers = first is not None
        return self.first_failed if first is None else first

    def explain(self, error: BaseException) -> str | None:
        """Which ranks are missing, where `error` says that a collective has lost one; takes `GRACE_SECONDS`.

        None for errors of other kinds.
        """
        if not is_lost(error):
            return None
        own, _ = self.now()
        missing = None
        if self._store_answers:
            missing = within(STORE_SECONDS + GRACE_SECONDS, lambda: self._missing(own))
        missing = missing or self.without_store()
        return f"a collective failed at {own.place}: {missing} ({first_line(error)})"

    def say_explained(self) -> None:
        """Let the others know that the run's end has been explained; rank 0 stays until they do, having the store."""
        if self._store_answers:
            within(STORE_SECONDS, lambda: self.store.set(EXPLAINED, ""))
        if self.rank == 0 and self.world_size > 1:
            time.sleep(GRACE_SECONDS)

    def wait_until_explained(self, seconds: float) -> None:
        """Wait until the speaker has explained the end, `seconds` at most."""
        deadline = time.monotonic() + seconds
        while self._store_answers and time.monotonic() < deadline:
            if within(STORE_SECONDS, lambda: self.store.check([EXPLAINED])) is not False:
                return  # explained, or the store has gone with rank 0
            time.sleep(1)

    def _missing(self, own: Note) -> str:
        """Which of the others are gone, or the furthest behind."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = self.notes_of(others)
        silence = Silence(BEAT_SECONDS)
        while silence.look() < GRACE_SECONDS:
            time.sleep(BEAT_SECONDS / 4)
        after = self.notes_of(others)
        unknown = Note("an unknown host", doing="before it had joined the others")
        seen = {rank: after.get(rank, unknown) for rank in others}
        gone = {r: note for r, note in seen.items() if not note.failed and note.beat == before.get(r, unknown).beat}
        if gone:
            last = f"last heard of: {_places(gone)}"
            return f"{_are(gone)} gone, with no sign of life for {silence.seconds:.0f} s; {last}"
        least = min(note.notes for note in [own, *seen.values()])
        if least == max(note.notes for note in [own, *seen.values()]):
            return "no rank is missing: all are alive and have come equally far"
        behind = {rank: note for rank, note in [(self.rank, own), *seen.items()] if note.notes == least}
        return f"{_are(behind)} missing: alive, but still at {_places(behind)}"

    def without_store(self) -> str:
        """What is known of rank 0 where the store, which it or its launcher has, does not answer; takes seconds."""
        state, serves_itself = meeting_place(), not launcher_has_store()
        address = f"at {Rendezvous.from_environment().place}, where the ranks meet"
        own, _ = self.now()
        first, seconds = (self._first, time.monotonic() - self._first_seen) if self.rank else (own, 0.0)
        who = f"rank 0 on {first.host}" if serves_itself else f"the launcher on rank 0's host ({first.host})"
        last = f"; last heard of rank 0, {seconds:.0f} s ago: {first.place}" if self.rank else ""
        if state is None:
            return f"rank 0's host does not answer {address}: it has ended, or {own.host} is cut off from it{last}"
        return f"{who} {state} {address}{last}"

    def _publish_for_ever(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS if self._now.beat else 0.0):
            try:
                self._publish()
                self._look_at_others()
                self._hand_on_questions()
            except Exception:  # the main thread will find out, if it still needs the store, and say so
                self.look_at_store()
                if not self._store_has_ended:
                    with suppress(Exception):
                        self._beats = self.store.clone()

    def _look_at_others(self) -> None:
        """Learn whether a rank has failed, and that rank 0 lives."""
        if self.first_failed is None and self._beats.check([FAILED]):
            self.first_failed = int(self._beats.get(FAILED).decode())
            if self.reports and self.first_failed != self.rank:
                self.reports.of_failure(f"rank {self.first_failed} has failed")
        if self.rank > 0 and self._beats.check([_key(0)]):
            first = Note(**json.loads(self._beats.get(_key(0))))
            if first.beat != self._first.beat:
                self._first, self._first_seen = first, time.monotonic()

    def _look_for_stalls(self, action: Callable[[LostRanksError], None]) -> None:
        last, silence = -1, Silence(GRACE_SECONDS)
        while not self._stopped.wait(BEAT_SECONDS):
            notes, step, doing, _ = self._doing
            stood = silence.look(notes != last or step == 0 or doing == SAVING)
            last = notes
            if stood > self.timeout.total_seconds() + BEAT_SECONDS:
                return action(LostRanksError(f"nothing has gone on for {stood:.0f} s"))
            if self._store_has_ended and not launcher_has_store() and stood > GRACE_SECONDS:
                return action(LostRanksError("nothing goes on, and the store has ended"))

    def _hand_on_questions(self) -> None:
        """Tell the others that this rank was asked for reports, or report because another was."""
        if self.reports:
            self.reports.beat()
        asked_here, self._asked = self._asked, False
        asked = self._beats.add(ASKED, int(asked_here))
        if self.reports and asked - asked_here > self._answered:
            self.reports.write("another rank was asked to")
        self._answered = asked

    def _publish(self) -> None:
        with self._publishing:
            now, _ = self.now()
            jobs = {kind: job.account() for kind, job in list(self.jobs.items())}
            self._now = replace(now, beat=now.beat + 1, jobs=jobs)
            self._beats.set(_key(self.rank), json.dumps(asdict(self._now)))


ENDED, SILENT = "has ended: nobody answers", "is stopped or hangs: somebody listens, and does not answer,"
CONNECT_SECONDS = 5.0


def meeting_place() -> str | None:
    """What has become of whoever has the store, where it does not answer: `ENDED`, `SILENT`; None where none can say.

    To be followed by ` at 10.0.0.1:29500`.
    """
    rendezvous = Rendezvous.from_environment()
    if rendezvous.address is None or not rendezvous.port:  # the ranks have met in a file
        return None
    try:
        socket.create_connection((rendezvous.address, rendezvous.port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return ENDED
    except (OSError, ValueError):
        return None
    return SILENT


_watches: dict[int, tuple[dist.Store, Watch]] = {}


def process_watch() -> Watch:
    """The watch of this process, which begins when it is first asked for; the processes must have joined."""
    store = dist.distributed_c10d._get_default_store()
    if id(store) not in _watches:
        _watches.clear()
        _watches[id(store)] = (store, Watch(store, dist.get_rank(), dist.get_world_size()))
    return _watches[id(store)][1]


def note(doing: str) -> None:
    """`Watch.note` of this process' watch, if the processes have joined."""
    if dist.is_initialized():
        process_watch().note(doing)


def stop_watching() -> None:
    """End this process' watch, if there is one; before the processes leave each other."""
    for _, watch in _watches.values():
        watch.stop()
    _watches.clear()


def notes_in(store: dist.Store, ranks: Iterable[int]) -> dict[int, Note]:
    """What the ranks have last published in `store`, in two questions, unless some never have."""
    keys = {rank: _key(rank) for rank in ranks}
    if keys and not store.check(list(keys.values())):
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    texts = store.multi_get(list(keys.values())) if keys else []
    return {rank: Note(**json.loads(text)) for rank, text in zip(keys, texts, strict=True)}


def _key(rank: int) -> str:
    return f"dsmoe/watch/{rank}"


def _are(notes: Mapping[int, Note]) -> str:
    """`ranks 2-3 on host1 are`."""
    return f"{ranks_on_hosts({rank: note.host for rank, note in notes.items()})} {'is' if len(notes) == 1 else 'are'}"


def _places(notes: Mapping[int, Note]) -> str:
    places = list(dict.fromkeys(note.place for _, note in sorted(notes.items())))
    return "; ".join([*places[:SHOWN], *(["..."] if len(places) > SHOWN else [])])
