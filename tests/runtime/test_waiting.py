"""Waits for other ranks' work have no timeout while those are alive, and their progress is logged."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.parallel import Groups
from dsmoe.parallel.shape_check import agree
from dsmoe.plan import Topology
from dsmoe.preflight import meeting
from dsmoe.runtime import progress, waiting, watchdog
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.processes import run_on_all_ranks, run_on_host_leaders, run_on_rank_0, set_group_timeouts
from dsmoe.runtime.progress import Job
from dsmoe.runtime.spawn import RanksFailedError, run_ranks
from dsmoe.runtime.waiting import run_watched
from dsmoe.runtime.watchdog import process_watchdog
from tests.helpers.waiting import until


def on_two_hosts(folder: Path) -> str:
    """Ranks 0 and 2 are the first of their hosts; rank 2's work takes longer than a collective may."""
    rank, package = dist.get_rank(), logging.getLogger("dsmoe")
    os.environ["LOCAL_RANK"] = str(rank % 2)
    said = logging.FileHandler(folder / f"{rank}.out", encoding="utf-8")
    package.addHandler(said)  # as a run has its console
    package.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    before = package.level, list(package.handlers), said.level
    set_group_timeouts(timedelta(seconds=4))
    process_watchdog().timeout = timedelta(seconds=60)  # it lives, and its beats say so
    progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS = 1.0, 0.2  # type: ignore[misc]
    watchdog.HEARTBEAT_SECONDS = 0.2  # type: ignore[misc]

    def work() -> None:
        (folder / f"worked {rank}").touch()
        if rank == 2:
            begun, first = time.monotonic(), folder / "0.out"
            least, most = begun + 5, begun + 60
            while time.monotonic() < least or (
                time.monotonic() < most and first.read_text(encoding="utf-8").count("tokenising: ") < 2
            ):
                logging.getLogger("dsmoe.data").info("tokenising: %.0f of many", time.monotonic() - begun)
                time.sleep(0.2)
            (folder / "done").touch()

    run_on_host_leaders(work, "preparing the data of each host")
    assert (folder / "done").exists()
    dist.barrier()
    assert (package.level, list(package.handlers), said.level) == before
    return process_watchdog().position()[0].activity


def test_a_slow_host_is_waited_for_and_seen(tmp_path: Path) -> None:
    assert run_ranks(4, on_two_hosts, tmp_path) == [waiting.WAITING] * 4
    assert sorted(path.name for path in tmp_path.glob("worked *")) == ["worked 0", "worked 2"]
    lines = (tmp_path / "0.out").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("preparing the data of each host has taken ") for line in lines), lines
    assert any(
        re.search(r"s so far\. rank 2 on \S+: tokenising: \d+ of many; ranks 0-1, 3 on ", line) for line in lines
    )
    assert [(tmp_path / f"{rank}.out").read_text(encoding="utf-8") for rank in (1, 2, 3)] == [""] * 3


def fail_on_one_host() -> str:
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)

    def work() -> None:
        if rank == 2:
            raise UserError("data.cache_dir: cannot use /scratch: No space left on device")

    with pytest.raises(UserError) as error:
        run_on_host_leaders(work, "preparing")
    return str(error.value)


def test_what_fails_on_one_host_is_raised_on_all() -> None:
    assert run_ranks(4, fail_on_one_host) == ["data.cache_dir: cannot use /scratch: No space left on device"] * 4


def hear_of_a_failure() -> str:
    watchdog.HEARTBEAT_SECONDS = 0.1  # type: ignore[misc]
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        assert process_watchdog().announce_failure() == 1
        store.wait(["0 has heard", "2 has heard"], timedelta(seconds=30))
        return ""
    with pytest.raises(LostRanksError) as error:
        run_on_all_ranks(lambda: None)
    store.set(f"{dist.get_rank()} has heard", "")
    return str(error.value)


def test_nobody_waits_for_a_rank_that_has_failed() -> None:
    assert run_ranks(3, hear_of_a_failure) == ["rank 1 has failed", "", "rank 1 has failed"]


def give_up_a_silent_one() -> str:
    watchdog.HEARTBEAT_SECONDS = 0.1  # type: ignore[misc]
    progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS, progress.LOST_SECONDS = 1.0, 0.2, 1.0  # type: ignore[misc]
    progress.GRACE_SECONDS = 0.5  # type: ignore[misc]
    rank = dist.get_rank()

    store = dist.distributed_c10d._get_default_store()

    def work() -> None:
        if rank == 1:
            process_watchdog().stop()  # no more beats, as of a process that is stopped
            store.wait(["given up"], timedelta(seconds=60))
            raise SystemExit  # rank 0 is in no collective any more

    os.environ["LOCAL_RANK"] = "0"
    if rank == 1:
        with suppress(SystemExit):
            run_on_host_leaders(work, "preparing")
        return ""
    with pytest.raises(LostRanksError) as error:
        run_on_host_leaders(work, "preparing")
    store.set("given up", "")
    return str(error.value)


def test_a_silent_rank_is_given_up() -> None:
    first, _ = run_ranks(2, give_up_a_silent_one)
    assert re.match(r"preparing: rank 1 on \S+ is gone, with no sign of life for \d+ s; last heard of: ", first)


def wait_in_vain(what: str) -> tuple[str, float]:
    """Rank 0 fails, or is silent, or rank 1 is, while rank 1 or 0 waits in what would last for hours."""
    watchdog.HEARTBEAT_SECONDS = 0.1  # type: ignore[misc]
    progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS, progress.LOST_SECONDS = 1.0, 0.2, 1.0  # type: ignore[misc]
    progress.GRACE_SECONDS = 0.5  # type: ignore[misc]
    rank, own = dist.get_rank(), process_watchdog()
    own.timeout = timedelta(seconds=2)
    with Job("long", "a long job", fails_on_lost_rank=True) as job:
        time.sleep(0.5)
        if rank == (1 if what == "rank 1 is silent" else 0):
            own.stop() if "silent" in what else own.announce_failure()
            time.sleep(10)
            return "", 0.0
        begun = time.monotonic()
        with pytest.raises(LostRanksError) as error:
            run_watched(lambda: time.sleep(7200), job if what == "rank 1 is silent" else None)
        return str(error.value), time.monotonic() - begun


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rank 0 has failed", "rank 0 has failed"),
        ("rank 0 is silent", r"rank 0 has given no sign of life for \d+ s"),
        ("rank 1 is silent", r"a long job: rank 1 on \S+ is gone, with no sign of life for \d+ s; last heard of: "),
    ],
    ids=["rank 0 has failed", "rank 0 is silent", "rank 1 is silent"],
)
def test_a_collective_that_would_wait_for_hours_is_left_when_a_rank_is_gone(what: str, message: str) -> None:
    text, seconds = max(run_ranks(2, wait_in_vain, what))
    assert re.match(message, text)
    assert seconds < 30


def meet_at_a_store_that_hangs(what: str) -> str:
    """Wait at a store as in a stopped process."""
    watchdog.HEARTBEAT_SECONDS = 0.1  # type: ignore[misc]
    own = process_watchdog()
    own.timeout = timedelta(seconds=2)
    group = replace(Groups(Topology(1, 2, expert=2)).expert_group(), label="layer 1")
    time.sleep(1)
    if dist.get_rank() == 0:
        own.stop()
        time.sleep(8)
        return ""

    class Hangs:
        def __getattr__(self, name: str) -> object:
            return lambda *_: time.sleep(7200)

    own.store = Hangs()  # type: ignore[assignment]
    waits: dict[str, Callable[[], object]] = {
        "an exchange": lambda: agree(group, torch.zeros(3, 8), 6, "not padded"),
        "a check of the cluster": lambda: meeting._wait(own.store, ["anything"], timedelta(seconds=2)),
    }
    with pytest.raises(LostRanksError) as error:
        waits[what]()
    return str(error.value)


@pytest.mark.parametrize("what", ["an exchange", "a check of the cluster"])
def test_a_store_that_never_answers_is_not_waited_for(what: str) -> None:
    _, text = run_ranks(2, meet_at_a_store_that_hangs, what)
    assert re.fullmatch(r"rank 0 has given no sign of life for \d+ s", text)


def reporters(environments: list[dict[str, str]]) -> list[tuple[bool, bool]]:
    """The answers of `reports_for_host` to these processes, twice each; all live until all have asked."""
    context = multiprocessing.get_context("fork")
    answers, together = context.SimpleQueue(), context.Barrier(len(environments))

    def ask(environment: dict[str, str]) -> None:
        from dsmoe.runtime.reporting_rank import reports_for_host

        answers.put((reports_for_host(environment), reports_for_host(environment)))
        together.wait(120)

    processes = [context.Process(target=ask, args=(environment,)) for environment in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return sorted(answers.get() for _ in processes)


def test_one_rank_reports_for_a_host() -> None:
    assert reporters([{"MASTER_PORT": f"no port {os.getpid()}"}] * 4) == [(False, False)] * 3 + [(True, True)]


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"])
def test_runs_and_attempts_have_reporting_ranks_of_their_own(name: str) -> None:
    run = {"MASTER_PORT": f"no port {os.getpid()}", "MASTER_ADDR": "here", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert reporters([run, run, {**run, name: "another"}]) == [(False, False)] + [(True, True)] * 2


def catches(process: int, number: signal.Signals) -> bool:
    """Return whether the process has a handler of that signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_while_waiting(folder: Path) -> None:
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store.set("process", str(os.getpid()))

    def work() -> None:
        waiting_rank = psutil.Process(int(store.get("process")))
        until(lambda: catches(waiting_rank.pid, signal.SIGTERM))  # it waits
        waiting_rank.terminate()
        with suppress(psutil.NoSuchProcess):
            while waiting_rank.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
        (folder / "ended").touch()
        time.sleep(60)

    run_on_rank_0(work)


def test_a_signal_ends_a_rank_that_waits(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(2, end_while_waiting, tmp_path, timeout=60)
    assert (tmp_path / "ended").exists()
