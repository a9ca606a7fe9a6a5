"""What was silent while this process looked, and not while it stood still itself."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dsmoe.runtime import heartbeat as module
from dsmoe.runtime import watchdog as watches
from dsmoe.runtime.heartbeat import Silence
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.watchdog import Watch


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
def watch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Rank 1, which sees nothing of rank 0."""
    monkeypatch.setattr(watches, "GRACE_SECONDS", 6.0)
    watch = Watch(dist.HashStore(), 1, 2)
    watch.timeout = timedelta(seconds=60)
    yield watch
    watch.stop()


def test_only_the_time_between_looks_that_a_running_process_makes_counts(clock: Clock) -> None:
    silence = Silence(6.0)
    for seconds, counted in ((0.5, 0.5), (2.0, 2.5), (86_400.0, 8.5), (1.0, 9.5)):
        clock.now += seconds
        assert silence.look() == pytest.approx(counted)
    assert silence.look(is_sign=True) == 0.0
    clock.now += 1.0
    assert silence.look() == pytest.approx(1.0)


@pytest.mark.parametrize("asked_before", [0, 3])
def test_a_rank_on_a_host_that_was_suspended_does_not_accuse_rank_0(
    asked_before: int, watch: Watch, clock: Clock
) -> None:
    for _ in range(asked_before):
        clock.now += 0.5
        assert not watch.has_lost_first()
    for _ in range(3):  # asked before the watch's thread has looked again
        clock.now += 7200.0
        assert not watch.has_lost_first()
        watch.check_others()


def test_a_rank_0_that_is_silent_while_it_is_watched_is_given_up_with_the_silence_that_was_measured(
    watch: Watch, clock: Clock
) -> None:
    looks = 0
    while not watch.has_lost_first():
        looks += 1
        clock.now += 0.5
    limit = 60 + 2 * watches.BEAT_SECONDS
    assert looks == pytest.approx(2 * limit + 1, abs=1)
    clock.now += 5.0
    with pytest.raises(LostRanksError, match=r"^rank 0 has given no sign of life for (69|70) s$"):
        watch.check_others()


def test_a_beat_ends_the_silence(watch: Watch, clock: Clock) -> None:
    for _ in range(110):
        clock.now += 0.5
        assert not watch.has_lost_first()
    watch._first = watches.Note("host0", beat=7)
    for _ in range(110):
        clock.now += 0.5
        assert not watch.has_lost_first()
