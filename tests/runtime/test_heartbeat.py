"""The heartbeat timer counts only time in which this process was running."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dsmoe.runtime import heartbeat as module
from dsmoe.runtime import watchdog as watches
from dsmoe.runtime.heartbeat import HeartbeatTimer
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def watch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchdog]:
    """Rank 1, which sees nothing of rank 0."""
    monkeypatch.setattr(watches, "GRACE_SECONDS", 6.0)
    watch = Watchdog(dist.HashStore(), 1, 2)
    watch.timeout = timedelta(seconds=60)
    yield watch
    watch.stop()


def test_only_time_in_which_the_process_was_running_counts(clock: Clock) -> None:
    silence = HeartbeatTimer(6.0)
    for seconds, counted in ((0.5, 0.5), (2.0, 2.5), (86_400.0, 8.5), (1.0, 9.5)):
        clock.now += seconds
        assert silence.update() == pytest.approx(counted)
    assert silence.update(is_beat=True) == 0.0
    clock.now += 1.0
    assert silence.update() == pytest.approx(1.0)


@pytest.mark.parametrize("asked_before", [0, 3])
def test_a_rank_on_a_host_that_was_suspended_does_not_accuse_rank_0(
    asked_before: int, watch: Watchdog, clock: Clock
) -> None:
    for _ in range(asked_before):
        clock.now += 0.5
        assert not watch.has_lost_rank_0()
    for _ in range(3):  # asked before the watch's thread has looked again
        clock.now += 7200.0
        assert not watch.has_lost_rank_0()
        watch.check_others()


def test_a_rank_0_that_is_silent_while_it_is_watched_is_given_up_with_the_silence_that_was_measured(
    watch: Watchdog, clock: Clock
) -> None:
    looks = 0
    while not watch.has_lost_rank_0():
        looks += 1
        clock.now += 0.5
    limit = 60 + 2 * watches.HEARTBEAT_SECONDS
    assert looks == pytest.approx(2 * limit + 1, abs=1)
    clock.now += 5.0
    with pytest.raises(LostRanksError, match=r"^rank 0 has given no sign of life for (69|70) s$"):
        watch.check_others()


def test_a_heartbeat_resets_the_timer(watch: Watchdog, clock: Clock) -> None:
    for _ in range(110):
        clock.now += 0.5
        assert not watch.has_lost_rank_0()
    watch._rank_0 = watches.Position("host0", heartbeat=7)
    for _ in range(110):
        clock.now += 0.5
        assert not watch.has_lost_rank_0()
