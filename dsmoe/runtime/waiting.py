"""Waits without a time limit: some ranks work while the others wait, as long as those that work are alive.

A collective has a timeout, and tokenising a corpus or reading a checkpoint has none. So ranks do not wait in a
collective: a rank that is done says so in the store, and one that waits checks now and then that the ranks it waits for
are alive.
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
from dsmoe.runtime.watchdog import Watchdog, process_watchdog

T = TypeVar("T")

POLL_SECONDS = 0.5
"""The time between two checks that the ranks waited for are alive."""
WAITING = "waiting for the work of other ranks"
WORKING = "work that other ranks wait for"


def while_others_wait(workers: Collection[int], action: Callable[[], T], job: Job) -> T | None:
    """Run `action` on the ranks of `workers`; returns on all ranks when all of them have. Collective.

    Args:
        workers: ranks, the same on every rank.
        action: must not raise. What it logs for `dsmoe` is published as this rank's activity.
        job: the job of which this is a part, and which every rank has entered: the log says every minute how far the
            workers are (`dsmoe.runtime.progress`).

    Returns:
        The result of `action`; None on a rank that only waits.

    Raises:
        LostRanksError: a rank has failed, rank 0 has ended, or a worker has no heartbeat.
    """
    watch = process_watchdog()
    watch.record(WAITING)
    if watch.world_size == 1:
        return action()
    result = None
    if watch.rank in workers:
        with _publish_log(watch, job):
            result = action()
    if not job.has_wait_reason:
        job.waits(WAITING)
    _wait(watch, workers, job)
    return result


def run_watched(action: Callable[[], T], job: Job | None = None) -> T:
    """Run `action`, in which this rank waits for others, in a thread, and check meanwhile that they are alive.

    For collectives that may take any time, and a store that may not answer: a rank that has ended, has failed or has no
    heartbeat is noticed long before their own timeout, which may be hours. The thread is then left running.

    Args:
        action: must not depend on the thread that it is in.
        job: the job of which this is a part; with `fails_on_lost_rank`, a rank without a heartbeat ends the wait.

    Raises:
        LostRanksError: a rank has failed, rank 0 has ended, or one has no heartbeat.
    """
    watch = process_watchdog()
    ready, results, errors = threading.Event(), list[T](), list[BaseException]()

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)
        ready.set()

    threading.Thread(target=act, daemon=True, name="dsmoe waiting").start()
    with _deferred_sigterm() as sigterm:
        while not ready.wait(POLL_SECONDS):
            if sigterm.is_set():  # from a launcher, perhaps because rank 0 has ended
                watch.check_store()
            watch.check_others()
            if job is not None and job.lost_error:
                raise job.lost_error
            if sigterm.is_set():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
    if errors:
        raise errors[0]
    return results[0]


def _wait(watch: Watchdog, workers: Collection[int], job: Job) -> None:
    number = watch.next_wait_number()
    if workers == [0] and watch.rank == 0:
        watch.store.set(_key(number, "done"), "")
        return

    def meet() -> None:
        """For a thread: a store on an unreachable host, or in a stopped process, may never answer."""
        if watch.rank in workers and watch.store.add(_key(number, "count"), 1) == len(workers):
            watch.store.set(_key(number, "done"), "")
        _wait_for_key(watch.store, _key(number, "done"))

    run_watched(meet, job)


def _key(number: int, what: str) -> str:
    return f"dsmoe/wait/{number}/{what}"


def _wait_for_key(store: dist.Store, key: str) -> None:
    pause = 0.01  # short waits end at once, and of long ones the store of thousands of ranks hears twice a second
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


class _ActivityHandler(logging.Handler):
    """Publish each log message as this rank's activity."""

    def __init__(self, watch: Watchdog, job: Job) -> None:
        super().__init__(logging.INFO)
        self._watch, self._job = watch, job

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._watch.describe(text)
        self._job.at(text)


@contextmanager
def _publish_log(watch: Watchdog, job: Job) -> Iterator[None]:
    """Publish what `dsmoe` logs, from INFO on, as this rank's activity; consoles keep their levels."""
    package = logging.getLogger("dsmoe")
    activity, levels = _ActivityHandler(watch, job), [(handler, handler.level) for handler in package.handlers]
    level = package.level
    for handler, _ in levels:
        handler.setLevel(max(handler.level, level))
    package.setLevel(min(level or logging.WARNING, logging.INFO))
    package.addHandler(activity)
    watch.describe(WORKING)
    job.at("working on it")
    try:
        yield
    finally:
        package.removeHandler(activity)
        package.setLevel(level)
        for handler, before in levels:
            handler.setLevel(before)
        watch.describe(WAITING)


@contextmanager
def _deferred_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, in place of ending this process at once: it can first say why."""
    received = threading.Event()

    def receive(_: int, __: FrameType | None) -> None:
        received.set()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield received
        return
    signal.signal(signal.SIGTERM, receive)
    try:
        yield received
    finally:
        if signal.getsignal(signal.SIGTERM) is receive:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
