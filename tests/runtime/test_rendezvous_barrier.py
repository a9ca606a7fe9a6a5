"""Ranks arrive at the rendezvous, or are named as missing; also if rank 0 is missing."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dsmoe.runtime import heartbeat, rendezvous_barrier
from dsmoe.runtime.consistency import RankMismatchError
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.processes import HostError, join_processes, leave_processes
from dsmoe.runtime.spawn import CONTEXT
from tests.helpers.ports import free_port


def come(rank: int, port: int, seconds: float, folder: Path, others: list[int]) -> None:
    """A rank of two nodes with two devices each; its file has what comes of it, and then what it has printed.

    The time of rank 0 begins when the others that come at all are there.
    """
    await_all = rendezvous_barrier._await_all

    def await_those_that_do_not_come(store: dist.Store, keys: list[str], *rest: Any) -> None:
        store.wait([keys[other] for other in others], timedelta(seconds=100))
        await_all(store, keys, *rest)

    rendezvous_barrier._await_all = await_those_that_do_not_come
    reach = rendezvous_barrier._reach
    if 0 in others:
        rendezvous_barrier._reach = lambda address, port, _: reach(address, port, timedelta(seconds=100))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % 2), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rendezvous_barrier.NOTICE_SECONDS = 0.3
    os.dup2(os.open(folder / f"{rank}.out", os.O_CREAT | os.O_WRONLY), 1)
    try:
        join_processes("cpu", timedelta(seconds=seconds))
        dist.barrier()
        result = f"rank {dist.get_rank()} has joined"
        leave_processes()
    except (LostRanksError, HostError, RankMismatchError) as error:
        result = f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    (folder / f"{rank}.result").write_text(result, encoding="utf-8")


def results_of(ranks: list[int], seconds: float, folder: Path, port: int = 0) -> tuple[list[str], list[str]]:
    """The outcome of each rank, and its output."""
    port = port or int(free_port())
    processes = [CONTEXT.Process(target=come, args=(rank, port, seconds, folder, ranks)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    results, said = (
        [(folder / f"{rank}.{kind}").read_text(encoding="utf-8") for rank in sorted(ranks)]
        for kind in ("result", "out")
    )
    return results, said


def test_all_who_come_join(tmp_path: Path) -> None:
    results, said = results_of([3, 1, 0, 2], 30, tmp_path)
    assert results == [f"rank {rank} has joined" for rank in range(4)]
    assert all("waiting for " in line for text in said for line in text.splitlines())


def test_those_who_do_not_come_are_named(tmp_path: Path) -> None:
    (result, other), (said, _) = results_of([0, 1], 1.5, tmp_path)
    missing = "2 of 4 ranks (ranks 2-3 on node 1, from 0)"
    assert result.startswith(f"LostRanksError: {missing} have not come within 2 s to 127.0.0.1:")
    assert other == result.replace("LostRanksError", "RankMismatchError"), "the others end as rank 0 does, in silence"
    assert set(said.splitlines()) == {f"waiting for {missing}"}


def test_notices_come_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: now.__setitem__(0, now[0] + 1))
    for module in (rendezvous_barrier, heartbeat):
        monkeypatch.setattr(module, "time", clock)
    assert [now[0] for is_due in rendezvous_barrier._attempts(timedelta(seconds=300)) if is_due] == [21, 61, 141]
    assert len(list(rendezvous_barrier._attempts(timedelta(seconds=-1)))) == 0
    assert list(rendezvous_barrier._attempts(timedelta(0))) == [False], "one look at least"


@pytest.mark.parametrize("world", ["1", "2"])
def test_rank_0_whose_host_does_not_know_its_address_says_so(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "MASTER_ADDR": "no.such.host.invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous_barrier, "NOTICE_SECONDS", 0.0)
    with pytest.raises(LostRanksError, match=r"has rank 0, and no\.such\.host\.invalid \(MASTER_ADDR\) is not known"):
        rendezvous_barrier.rendezvous_barrier(None, timedelta(seconds=0.3), {})


def come_again(rank: int, attempt: int, store_port: int, folder: Path) -> None:
    """A rank of two that torchrun, in whose process the store is, has started for the `attempt`th time."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store_port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(attempt))
    try:
        rendezvous_barrier.rendezvous_barrier(2, timedelta(seconds=1 if attempt else 100), {"train.seed": "0"})
        result = "all have come"
    except LostRanksError as error:
        result = str(error)
    (folder / f"{rank} {attempt}").write_text(result, encoding="utf-8")


def test_those_of_an_earlier_attempt_have_not_come(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for ranks, attempt in (((0, 1), 0), ((0,), 1)):
        processes = [CONTEXT.Process(target=come_again, args=(rank, attempt, store.port, tmp_path)) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(150)
    said = [(tmp_path / name).read_text(encoding="utf-8") for name in ("0 0", "1 0", "0 1")]
    assert said[:2] == ["all have come"] * 2
    assert said[2].startswith("1 of 2 ranks (rank 1 on node 0, from 0) have not come within 1 s")


def test_a_rank_0_that_is_not_there_is_missed_by_each_host(tmp_path: Path) -> None:
    results, (first, second) = results_of([2, 3], 3, tmp_path)
    for result in results:
        assert result.startswith("LostRanksError: rank 0 is not reached at 127.0.0.1:")
        assert "Connection refused; has the launcher started it" in result
    assert "waiting for rank 0 at 127.0.0.1:" in first
    assert second == ""


def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (result,), _ = results_of([0], 5, tmp_path, port)
    assert result.startswith(f"HostError: port {port} is in use on this machine; give the launcher another")
