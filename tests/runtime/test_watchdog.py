"""After a failure, the watchdog names the missing ranks, with the reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dsmoe.runtime import watchdog as module
from dsmoe.runtime.watchdog import SAVING, Watchdog
from tests.helpers.waiting import until

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:3456")


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """Four ranks of one store, in this process."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 1.0)
    store = dist.HashStore()
    ranks = [Watchdog(store, rank, 4) for rank in range(4)]
    for watch in ranks:
        watch.record("layer 0, exchange", step=7)
    until(lambda: [position.step for position in ranks[0].positions_of(range(4)).values()] == [7] * 4)
    yield ranks
    for watch in ranks:
        watch.stop()


def test_a_rank_without_a_heartbeat_is_gone(watches: list[Watchdog]) -> None:
    watches[2].stop()
    text = watches[0].explain(RESET)
    assert text is not None
    assert text.startswith("a collective failed at step 7, layer 0, exchange: rank 2 on ")
    assert "gone, with no sign of life" in text
    assert "last heard of: step 7, layer 0, exchange (Connection closed by peer [10.0.0.2]:3456)" in text


def test_the_seconds_without_a_heartbeat_are_measured(watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    watches[2].stop()
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 8.0)  # looked at every two seconds
    assert "rank 2 on " in (text := str(watches[0].explain(RESET)))
    assert "with no sign of life for 2 s" in text, "and not 0.3, which is the least"


def test_the_furthest_behind_of_the_living_is_missing(watches: list[Watchdog]) -> None:
    for rank, count in enumerate((3, 1, 2, 3)):
        for number in range(count):
            watches[rank].record(f"layer {number + 1}, exchange")
    until(lambda: [position.count for position in watches[0].positions_of(range(4)).values()] == [4, 2, 3, 4])
    text = watches[0].explain(RESET)
    assert text is not None
    assert "at step 7, layer 3, exchange: rank 1 on " in text
    assert "missing: alive, but still at step 7, layer 1, exchange" in text
    assert "rank 2" not in text


def test_nobody_is_blamed_where_all_have_come_equally_far(watches: list[Watchdog]) -> None:
    assert "no rank is missing" in str(watches[0].explain(RESET))


def test_a_failed_rank_that_waits_for_the_first_one_is_not_gone(watches: list[Watchdog]) -> None:
    assert watches[3].announce_failure() == 3
    watches[3].stop()
    assert "no rank is missing" in str(watches[0].explain(RESET))


def test_the_first_failed_rank_is_agreed_on(watches: list[Watchdog]) -> None:
    assert watches[1].announce_failure() == 1
    assert watches[2].announce_failure() == 1
    watches[1].announce_explained()
    watches[2].wait_until_explained(1000)  # which it does not


def test_the_first_failed_rank_is_known_without_the_store(
    watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watches[0].announce_failure() == 0
    until(lambda: watches[1].first_failed == 0)
    monkeypatch.setattr(watches[1], "store", None)
    assert watches[1].announce_failure() == 0


def test_a_store_that_does_not_answer_is_said_so(watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_SECONDS", 0.3)
    answers = threading.Event()
    monkeypatch.setattr(watches[1], "positions_of", lambda _: answers.wait(1000))
    assert "rank 0's host does not answer" in str(watches[1].explain(RESET))
    answers.set()


def test_heartbeats_go_on_after_one_that_failed(watches: list[Watchdog]) -> None:
    publish, failed = watches[1]._publish, threading.Event()

    def fail_once() -> None:
        watches[1]._publish = publish  # type: ignore[method-assign]
        failed.set()
        raise RuntimeError("no route to the store")

    watches[1]._publish = fail_once  # type: ignore[method-assign]
    until(failed.is_set)
    before = watches[0].positions_of([1])[1].heartbeat
    until(lambda: watches[0].positions_of([1])[1].heartbeat > before + 1, 10)


def test_the_last_position_of_a_rank_is_known(watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 1000.0)
    watch = Watchdog(watches[0].store, 3, 4)
    until(lambda: watches[0].positions_of([3])[3].activity == "starting")
    watch.record("leaving", step=9)
    watch.stop()
    assert watches[0].positions_of([3])[3].text == "step 9, leaving"


def test_a_silent_rank_0_is_given_up_after_the_timeout(watches: list[Watchdog]) -> None:
    assert not watches[1].has_lost_rank_0()
    watches[0].stop()
    watches[1].timeout = timedelta(seconds=0.3)
    until(watches[1].has_lost_rank_0, 20)


@pytest.mark.parametrize("of_launcher", [False, True])
def test_a_store_that_has_ended_tells_of_rank_0_only_where_that_has_it(
    of_launcher: bool, watches: list[Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(of_launcher))
    watches[1]._store_has_ended = True
    assert watches[1].has_lost_rank_0() is not of_launcher


@pytest.mark.parametrize("error", [ValueError("gloo"), RuntimeError("the disk is on fire")])
def test_other_errors_are_not_explained(watches: list[Watchdog], error: Exception) -> None:
    assert watches[0].explain(error) is None


def test_a_stall_is_noticed_within_a_step_only(watches: list[Watchdog]) -> None:
    stalls: list[int] = []
    watches[1].record(SAVING)
    watches[2].record("reading a checkpoint", step=0)
    for watch in watches[:3]:
        watch.timeout = timedelta(seconds=0.2)
        watch.watch_for_stalls(lambda _, rank=watch.rank: stalls.append(rank))  # type: ignore[misc]
    until(lambda: stalls)
    time.sleep(0.5)  # in which the others would have come as well
    assert stalls == [0]
