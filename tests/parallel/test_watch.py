"""After a failure the watch says who is missing, and why it thinks so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dsmoe.parallel import watch as module
from dsmoe.parallel.lost import LostRanksError
from dsmoe.parallel.watch import SAVING, Watch

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:3456")


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """Four ranks of one store, in this process."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    store = dist.HashStore()
    ranks = [Watch(store, rank, 4) for rank in range(4)]
    for watch in ranks:
        watch.note("layer 0, exchange", step=7)
    time.sleep(0.1)
    yield ranks
    for watch in ranks:
        watch.stop()


def test_a_rank_without_beats_is_gone(watches: list[Watch]) -> None:
    watches[2].stop()
    text = watches[0].explain(RESET)
    assert text is not None
    assert text.startswith("a collective failed at step 7, layer 0, exchange: rank 2 on ")
    assert "gone, with no sign of life" in text
    assert "last heard of: step 7, layer 0, exchange (Connection closed by peer [10.0.0.2]:3456)" in text


def test_the_silence_that_is_said_was_measured(watches: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    watches[2].stop()
    monkeypatch.setattr(module, "BEAT_SECONDS", 8.0)  # looked at every two seconds
    assert "rank 2 on " in (text := str(watches[0].explain(RESET)))
    assert "with no sign of life for 2 s" in text, "and not 0.3, which is the least"


def test_the_furthest_behind_of_the_living_is_missing(watches: list[Watch]) -> None:
    for rank, notes in enumerate((3, 1, 2, 3)):
        for number in range(notes):
            watches[rank].note(f"layer {number + 1}, exchange")
    text = watches[0].explain(RESET)
    assert text is not None
    assert "at step 7, layer 3, exchange: rank 1 on " in text
    assert "missing: alive, but still at step 7, layer 1, exchange" in text
    assert "rank 2" not in text


def test_nobody_is_blamed_where_all_have_come_equally_far(watches: list[Watch]) -> None:
    assert "no rank is missing" in str(watches[0].explain(RESET))


def test_a_failed_rank_that_waits_for_the_speaker_is_not_gone(watches: list[Watch]) -> None:
    assert watches[3].speaker() == 3
    watches[3].stop()
    assert "no rank is missing" in str(watches[0].explain(RESET))


def test_the_first_to_fail_speaks_and_the_others_know_it(watches: list[Watch]) -> None:
    assert watches[1].speaker() == 1
    assert watches[2].speaker() == 1
    begun = time.monotonic()
    watches[1].say_explained()
    watches[2].wait_until_explained(10)
    assert time.monotonic() - begun < 5


def test_the_speaker_is_known_without_the_store(watches: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    assert watches[0].speaker() == 0
    time.sleep(0.2)
    monkeypatch.setattr(watches[1], "store", None)
    assert watches[1].speaker() == 0


def test_a_store_that_does_not_answer_is_said_so_in_time(watches: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_SECONDS", 0.3)
    monkeypatch.setattr(watches[1], "notes_of", lambda _: time.sleep(60))
    begun = time.monotonic()
    assert "rank 0's host does not answer" in str(watches[1].explain(RESET))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("error", [ValueError("gloo"), RuntimeError("the disk is on fire")])
def test_other_errors_are_not_explained(watches: list[Watch], error: Exception) -> None:
    assert watches[0].explain(error) is None


def test_a_stall_is_noticed_within_a_step_only(watches: list[Watch]) -> None:
    stalls: list[LostRanksError] = []
    for watch in watches[:2]:
        watch.timeout = timedelta(seconds=0.2)
        watch.end_stalls(stalls.append)
    watches[1].note(SAVING)
    time.sleep(1.0)
    assert stalls
    watches[0].note(SAVING)
    time.sleep(0.2)
    stalls.clear()
    time.sleep(0.6)
    assert not stalls
