"""Let some ranks work while the others wait: however long it takes, as long as those who work live.

A collective has a time limit, and tokenising a corpus or reading a checkpoint has none. So ranks do not wait in a
collective: who is ready says so in the store, and who waits looks now and then whether those it waits for still live.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from dsmoe.runtime.progress import Job
from dsmoe.runtime.watchdog import Watch, process_watch

T = TypeVar("T")

LOOK_SECONDS = 0.5
"""How often a rank that waits looks whether there is still something to wait for."""
WAITING = "waiting for the work of other ranks"
WORKING = "work that other ranks wait for"


def while_others_wait(workers: Collection[int], action: Callable[[], T], job: Job) -> T | None:
    """Let every rank of `workers` do `action`; returns on all ranks when all of them have. Collective.

    Args:
        workers: ranks, the same on every rank.
        action: must not raise. What it logs for `dsmoe` is what this rank does, where others ask.
        job: of which this is a part, and which every rank has entered: the log says every minute how far the workers
            are (`dsmoe.runtime.progress`).

    Returns:
        What `action` has returned here; None on a rank that only waits.

    Raises:
        LostRanksError: a rank has failed, rank 0 has ended, or a worker gives no sign of life.
    """
    watch = process_watch()
    watch.note(WAITING)
    if watch.world_size == 1:
        return action()
    result = None
    if watch.rank in workers:
        with _shown(watch, job):
            result = action()
    if not job.says_why_it_waits:
        job.waits(WAITING)
    _wait(watch, workers, job)
    return result


def while_watched(action: Callable[[], T], job: Job | None = None) -> T:
    """Do `action`, in which this rank waits for others, in a thread; look meanwhile whether they still come.

    For collectives that may take any time, and a store that may not answer: a rank that has ended, has failed or gives
    no sign of life is known long before their own limit, which may be hours. The thread is left alone then.

    Args:
        action: must not depend on the thread that it is in.
        job: of which it is a part; where `ends_with_rank`, a silent rank ends the wait.

    Raises:
        LostRanksError: a rank has failed, rank 0 has ended, or one gives no sign of life.
    """
    watch = process_watch()
    ready, results, errors = threading.Event(), list[T](), list[BaseException]()

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)
        ready.set()

    threading.Thread(target=act, daemon=True, name="dsmoe waiting").start()
    with _asked_to_end() as asked:
        while not ready.wait(LOOK_SECONDS):
            if asked.is_set():  # by a launcher: because rank 0 has ended?
                watch.look_at_store()
            watch.check_others()
            if job is not None and job.lost:
                raise job.lost
            if asked.is_set():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
    if errors:
        raise errors[0]
    return results[0]


def _wait(watch: Watch, workers: Collection[int], job: Job) -> None:
    number = watch.count_wait()
    if workers == [0] and watch.rank == 0:
        watch.store.set(_key(number, "done"), "")
        return

    def meet() -> None:
        """In a thread: a store on a host that is cut off, or in a process that is stopped, may never answer."""
        if watch.rank in workers and watch.store.add(_key(number, "count"), 1) == len(workers):
            watch.store.set(_key(number, "done"), "")
        _wait_for_key(watch.store, _key(number, "done"))

    while_watched(meet, job)


def _key(number: int, what: str) -> str:
    return f"dsmoe/wait/{number}/{what}"


def _wait_for_key(store: dist.Store, key: str) -> None:
    pause = 0.01  # short waits end at once, and of long ones the store of thousands of ranks hears twice a second
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


class _Shown(logging.Handler):
    """Makes of what is logged what a rank is doing."""

    def __init__(self, watch: Watch, job: Job) -> None:
        super().__init__(logging.INFO)
        self._watch, self._job = watch, job

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._watch.say(text)
        self._job.at(text)


@contextmanager
def _shown(watch: Watch, job: Job) -> Iterator[None]:
    """Let the others see what `dsmoe` logs here, which is on the console for rank 0 alone; they see INFO as well."""
    package = logging.getLogger("dsmoe")
    shown, quiet = _Shown(watch, job), [(handler, handler.level) for handler in package.handlers]
    level = package.level
    for handler, _ in quiet:
        handler.setLevel(max(handler.level, level))
    package.setLevel(min(level or logging.WARNING, logging.INFO))
    package.addHandler(shown)
    watch.say(WORKING)
    job.at("working on it")
    try:
        yield
    finally:
        package.removeHandler(shown)
        package.setLevel(level)
        for handler, before in quiet:
            handler.setLevel(before)
        watch.say(WAITING)


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Whether SIGTERM has come, which would end this process at once: a moment to say why first."""
    asked = threading.Event()

    def note(_: int, __: FrameType | None) -> None:
        asked.set()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield asked
        return
    signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        if signal.getsignal(signal.SIGTERM) is note:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
