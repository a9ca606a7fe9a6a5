"""The progress of a long job is logged, by rank 0 or else by others; and a lost rank is named."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from dsmoe.runtime import progress, watchdog
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.progress import DONE, WAITING, WORKING, Job, summarize
from dsmoe.runtime.watchdog import Position, Watchdog
from tests.helpers.waiting import until


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """Four ranks of one store, in this process, in which a minute takes a moment."""
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    for name, seconds in {
        "GRACE_SECONDS": 0.2,
        "LOG_INTERVAL_SECONDS": 0.3,
        "POLL_SECONDS": 0.05,
        "LOST_SECONDS": 1.0,
        "LOG_TIMEOUT_SECONDS": 0.2,
        "STORE_SECONDS": 0.2,
    }.items():
        monkeypatch.setattr(progress, name, seconds)
    monkeypatch.setenv("LOCAL_RANK", "3")
    store = dist.HashStore()
    ranks = [Watchdog(store, rank, 4) for rank in range(4)]
    yield ranks
    for each in ranks:
        each.stop()


class Clock:
    """`time` for `progress`, which a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def begun(watches: list[Watchdog], **options: bool) -> list[Job]:
    """A save in which rank 2 writes, rank 3 has not begun, and the others have written."""
    started = [Job("save", "saving step_00000100", watch=each, **options).__enter__() for each in watches[:3]]
    for job in started[:2]:
        job.expect(5_000_000_000)
        job.waits("all written")
    started[2].expect(4_500_000_000)
    started[2].at("rank_00002_000.safetensors")
    started[2].add(1_200_000_000)
    watches[3].record("forward pass", step=101)
    return started


def end(started: list[Job]) -> None:
    for job in started:
        job.__exit__(None, None, None)


def poll_for(
    monitor: progress._ProgressMonitor, watches: list[Watchdog], alive: list[int], clock: Clock, seconds: float
) -> None:
    """Poll all ranks for `seconds` of the clock, while those that are alive have heartbeats."""

    def beats(rank: int) -> int:
        return watches[0].positions_of([rank])[rank].heartbeat

    end = clock.now + seconds
    while clock.now < end:
        before = watches[0].positions_of(alive)
        until(
            lambda before=before: all(
                watches[0].positions_of([rank])[rank].heartbeat > before[rank].heartbeat for rank in alive
            )
        )
        clock.now += 0.3
        monitor._poll(range(4))


def test_rank_0_says_every_minute_who_has_done_what(
    watches: list[Watchdog], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_TIMEOUT_SECONDS", 10.0)  # nor is rank 0 of a busy machine taken for silent
    started = begun(watches)
    until(lambda: len(caplog.records) >= 3)
    host = watches[0].position()[0].host
    for record in caplog.records[:3]:
        line = record.getMessage()
        assert line.startswith("saving step_00000100 has taken ")
        assert f"rank 2 on {host}: 1.20 of 4.50 GB, at rank_00002_000.safetensors" in line
        assert f"ranks 0-1 on {host}: all written" in line
        assert f"rank 3 on {host}: not begun (step 101, forward pass)" in line
    assert re.search(r"without a move for \d s", caplog.records[-1].getMessage())
    assert {record.levelno for record in caplog.records} == {logging.WARNING}, "rank 1 and 3 leave it to rank 0"
    end(started)
    count = len(caplog.records)
    time.sleep(0.8)
    assert len(caplog.records) <= count + 1, "no more when it has ended"


def test_nothing_is_said_or_read_of_a_short_job(
    watches: list[Watchdog], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 600.0)
    reads: list[object] = []
    monkeypatch.setattr(progress._ProgressMonitor, "_read", lambda *asked: reads.append(asked) or ({}, ""))
    started = begun(watches)
    time.sleep(0.5)
    assert not reads
    assert not caplog.records
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.01)
    until(lambda: reads)  # else none could have been seen above
    end(started)


def test_a_line_a_minute(watches: list[Watchdog], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 60.0)
    monitor = progress._ProgressMonitor(Job("save", "saving", watch=watches[0]), watches[0])
    logged: list[float] = []
    monitor._log = lambda _: logged.append(clock.now) or False  # type: ignore[method-assign]
    for _ in range(121):
        monitor._log_if_due()
        clock.now += 5.0
    assert logged == [60.0 * minute for minute in range(1, 11)]


def test_a_rank_that_has_done_its_part_may_be_silent(watches: list[Watchdog], clock: Clock) -> None:
    started = begun(watches)
    monitor = progress._ProgressMonitor(started[0], watches[0])
    started[1].__exit__(None, None, None)
    poll_for(monitor, watches, [0, 1, 2, 3], clock, 0.3)
    for rank in (1, 2):
        watches[rank].stop()
    poll_for(monitor, watches, [0, 3], clock, 0.9)
    assert monitor._silent().keys() == {2}
    end(started)


def test_where_rank_0s_log_hangs_rank_1_says_it(watches: list[Watchdog], caplog: pytest.LogCaptureFixture) -> None:
    may_log, hanging = threading.Event(), logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            may_log.wait(30)

    hanging.emit = emit  # type: ignore[method-assign]
    hanging.createLock = lambda: None  # type: ignore[method-assign]  # that of rank 1 is in another process
    hanging.lock = None
    logging.getLogger("dsmoe").addHandler(hanging)
    try:
        started = begun(watches)
        until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        (line, *_) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "rank 2 on " in line
        assert "1.20 of 4.50 GB" in line
        end(started)
    finally:
        may_log.set()
        logging.getLogger("dsmoe").removeHandler(hanging)


@pytest.mark.parametrize("gone", [0, 2])
def test_a_rank_without_a_heartbeat_is_named_and_ends_the_job(
    gone: int, watches: list[Watchdog], caplog: pytest.LogCaptureFixture
) -> None:
    started = begun(watches, fails_on_lost_rank=True)
    until(lambda: len(watches[0].positions_of(range(4))) == 4)
    watches[gone].stop()
    if gone == 0:
        started[0].ended.set()  # its threads stand still
    monitor = started[1 if gone == 0 else 0]
    until(lambda: monitor.lost_error)
    assert isinstance(monitor.lost_error, LostRanksError)
    place = "all written" if gone == 0 else "1.20 of 4.50 GB, at rank_00002_000.safetensors"
    assert f"saving step_00000100: rank {gone} on " in str(monitor.lost_error)
    assert re.search(
        rf" is gone, with no sign of life for \d+ s; last heard of: {re.escape(place)}", str(monitor.lost_error)
    )
    assert str(monitor.lost_error) in caplog.text
    end(started)


def test_a_rank_that_is_lost_is_in_the_log_before_the_run_ends_for_it(
    watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[LostRanksError | None] = []

    def log(monitor: progress._ProgressMonitor, line: str) -> bool:
        if "is gone" in line:
            known.append(monitor._job.lost_error)
        return True

    monkeypatch.setattr(progress._ProgressMonitor, "_log", log)
    started = begun(watches, fails_on_lost_rank=True)
    until(lambda: len(watches[0].positions_of(range(4))) == 4)
    watches[2].stop()
    until(lambda: started[0].lost_error)
    assert known[0] is None
    end(started)


def test_a_rank_that_is_only_silent_before_it_begins_ends_nothing(watches: list[Watchdog], clock: Clock) -> None:
    started = begun(watches, fails_on_lost_rank=True)
    until(lambda: len(watches[0].positions_of(range(4))) == 4)
    monitor = progress._ProgressMonitor(started[0], watches[0])
    watches[3].stop()
    poll_for(monitor, watches, [0, 1, 2], clock, 2.0)
    assert monitor._silent().keys() == {3}
    assert monitor._lost() is None
    watches[2].stop()
    poll_for(monitor, watches, [0, 1], clock, 2.0)
    assert "saving step_00000100: rank 2 on " in str(monitor._lost())
    end(started)


def test_a_process_that_stood_still_itself_blames_nobody(watches: list[Watchdog], clock: Clock) -> None:
    job = Job("save", "saving", fails_on_lost_rank=True, watch=watches[0])
    monitor = progress._ProgressMonitor(job, watches[0])
    started = begun(watches)
    until(lambda: len(watches[0].positions_of(range(4))) == 4)
    monitor._poll(range(4))
    before = {rank: position.heartbeat for rank, position in monitor._positions.items()}
    for each in watches[1:]:
        each.stop()  # as if they had had no store to tell
    monitor._poll(range(4))
    clock.now += 2.0  # longer than LOST_SECONDS, and without a look
    monitor._poll(range(4))
    assert monitor._lost() is None
    assert all(monitor._positions[rank].heartbeat >= before[rank] for rank in before)
    end(started)


def test_a_rank_that_monitors_nothing_learns_of_rank_0_unless_it_stood_still_itself(
    watches: list[Watchdog], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [True]
    monkeypatch.setattr(watches[3], "has_lost_rank_0", lambda: missing[0])
    job = Job("load", "loading step_00000100", watch=watches[3])
    assert job.check_lost() is None
    clock.now += 0.15
    assert job.check_lost() is None
    missing[0] = False  # it has heard of rank 0 again
    assert job.check_lost() is None
    missing[0] = True
    clock.now += 10
    assert job.check_lost() is None
    clock.now += 0.3
    assert str(job.check_lost()) == "loading step_00000100: rank 0 does not come"


def test_a_store_that_has_not_answered_for_long_blames_no_rank_when_it_does_again(
    watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks are cut off for a while, as by a switch that starts again: none could say that it lives."""
    started = begun(watches, fails_on_lost_rank=True)
    monitor = progress._ProgressMonitor(started[0], watches[0])
    monitor._poll(range(4))
    monkeypatch.setattr(monitor, "_read", lambda _: time.sleep(0.3) or 1 / 0)
    for each in watches[1:]:
        each.stop()  # as if they had had no store to say so to
    for _ in range(6):
        monitor._poll(range(4))
    monkeypatch.undo()
    monkeypatch.setattr(progress, "LOST_SECONDS", 1.0)
    monitor._poll(range(4))
    assert monitor._lost() is None
    end(started)


def test_the_seconds_without_a_lost_ranks_heartbeat_are_measured(watches: list[Watchdog]) -> None:
    started = begun(watches, fails_on_lost_rank=True)
    monitor = progress._ProgressMonitor(started[0], watches[0])
    time.sleep(0.1)
    monitor._poll(range(4))
    monitor._beaten[2] = monitor._seen[2] - 77.0
    assert " is gone, with no sign of life for 77 s; last heard of: " in str(monitor._lost())
    end(started)


def test_a_store_that_does_not_answer_is_said_and_ends_the_job(
    watches: list[Watchdog], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = begun(watches, fails_on_lost_rank=True)
    started[0].ended.set()
    monkeypatch.setattr(progress._ProgressMonitor, "_read", lambda *_: time.sleep(60))
    until(lambda: started[1].lost_error)
    assert "rank 0's host does not answer at " in str(started[1].lost_error)
    lines = [record.getMessage() for record in caplog.records if "has taken" in record.getMessage()]
    assert all("all written" in line for line in lines if "does not answer" in line), "what it knows of itself"
    end(started)


def test_the_line_of_thousands_of_ranks_is_one_that_people_read(watches: list[Watchdog]) -> None:
    job = Job("save", "saving", watch=watches[0])
    accounts = {
        rank: [1, WORKING, f"{rank % 7}.00 of 9.00 GB, at rank_{rank:05d}_000.safetensors", float(rank == 4000) * 50]
        for rank in range(4096)
    }
    accounts |= {rank: [1, WAITING, "all written", 0.0] for rank in range(0, 4000, 2)}
    accounts |= {rank: [1, DONE, "done", 0.0] for rank in range(8)}
    notes = {rank: Position(f"host{rank // 8}", jobs={"save": account}) for rank, account in accounts.items()}
    line = summarize(job, notes, dict.fromkeys(range(800, 816), 30.0))
    assert line.startswith("ranks 800-815 on host100, host101: no sign of life for 30 s; rank 4000 on host500: 3.00 of")
    assert "ranks 0-7 on host0: done" in line
    assert " more hosts: working as well; " in line
    assert line.index("working as well") < line.index("all written") < line.index("done")
    assert "1,988 ranks from 8 to 3998 on host1, host2, host3 and " in line
    assert len(line) < 1500


def test_a_number_of_batches_and_of_bytes_is_written_for_people() -> None:
    assert progress._amount(3, 1200, "batches") == "3 of 1,200 batches"
    assert progress._amount(1_234_567, 9_000_000, "") == "1.23 of 9.00 MB"
    assert progress._amount(1_200_000_000, 4_500_000_000, "") == "1.20 of 4.50 GB"
