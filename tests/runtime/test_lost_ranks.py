"""Errors of lost ranks are recognised by where they were raised, not by a word in their text."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dsmoe.runtime.lost_ranks import LostRanksError, first_line, is_lost_rank_error
from dsmoe.runtime.processes import set_group_timeouts
from dsmoe.runtime.spawn import run_ranks


def caught(action: Callable[[], object]) -> Exception:
    with pytest.raises(RuntimeError) as error:
        action()
    return error.value


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "text",
    [
        "the download of shard 3 timed out",
        "DataLoader timed out after 30 seconds",
        "Connection reset by peer",
        "the gloo of the stage is dry: Broken pipe",
        "Application timeout caused pair closure",
        "Watchdog",
    ],
)
def test_the_same_words_from_elsewhere_are_not(text: str) -> None:
    assert not is_lost_rank_error(caught(raising(RuntimeError(text))))
    assert not is_lost_rank_error(RuntimeError(text))


class Download:
    def wait(self) -> None:
        raise RuntimeError("the download of shard 3 timed out")


def patiently_wait() -> None:
    raise RuntimeError("patiently_wait() timed out")


def test_neither_are_other_things_that_are_waited_for() -> None:
    assert not is_lost_rank_error(caught(lambda: Download().wait()))
    assert not is_lost_rank_error(caught(patiently_wait))


def test_the_errors_of_a_store_and_our_own_are() -> None:
    store = dist.HashStore()
    assert is_lost_rank_error(caught(lambda: store.wait(["a"], timedelta(seconds=0.1))))
    assert is_lost_rank_error(LostRanksError("x"))


def lose_a_rank() -> list[tuple[bool, str]]:
    """On rank 0, the errors of collectives after rank 1 has been too late for one."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))  # its own: the others of the test go on
    dist.barrier(group)  # they have met in it
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    x, found = torch.ones(4), []
    if dist.get_rank() == 0:
        for action in (
            lambda: dist.all_reduce(x, group=group),
            lambda: dist.all_reduce(x, group=group),
            lambda: dist.all_reduce(x, group=group, async_op=True).wait(),
            lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2), group=group),
            lambda: dist.all_gather_object([None, None], 1, group=group),
        ):
            error = caught(action)
            found.append((is_lost_rank_error(error), first_line(error)))
    else:
        time.sleep(3)
    dist.barrier()
    return found


def test_what_gloo_raises_is_and_keeps_its_own_line() -> None:
    found, _ = run_ranks(2, lose_a_rank)
    assert all(lost for lost, _ in found), found
    lines = {line for _, line in found}
    assert "Timed out waiting 1000ms for recv operation to complete" in lines
    assert len(lines & {"Application timeout caused pair closure"}) == 1 or any("closed by peer" in x for x in lines)
    assert not any("/gloo/" in line for line in lines)


def give_wrong_arguments() -> bool:
    set_group_timeouts(timedelta(seconds=20))
    error = caught(lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2), [1, 2], [1, 1]))
    return is_lost_rank_error(error)


def test_what_a_collective_says_of_its_arguments_is_not() -> None:
    assert run_ranks(2, give_wrong_arguments) == [False, False]
