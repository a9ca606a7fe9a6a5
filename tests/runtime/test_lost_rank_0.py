"""Rank 0 dies or freezes, and with it the store that knows the first failed rank: one rank of each host reports."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe.runtime.spawn import CONTEXT
from tests.helpers.ports import free_port
from tests.train.test_run import pretrain, write_config

WORLD = 3


def _at_rendezvous(strike: Callable[[], None]) -> None:
    from dsmoe.runtime import rendezvous_barrier

    def await_all(*_: object) -> None:
        time.sleep(1)  # the others have come
        strike()

    rendezvous_barrier._await_all = await_all  # type: ignore[assignment]


def _tokenising(strike: Callable[[], None]) -> None:
    from dsmoe.data import cache

    def build(*_: object) -> None:
        time.sleep(1)  # the others wait
        strike()

    cache._build = build


def _in_a_step(strike: Callable[[], None]) -> None:
    from dsmoe.train import Trainer

    step = Trainer.step

    def striking(self: Trainer) -> object:
        if self.step_index == 2:
            strike()
        return step(self)

    Trainer.step = striking  # type: ignore[assignment, method-assign]


def _saving(strike: Callable[[], None]) -> None:
    from dsmoe.checkpoint import safetensors

    write = safetensors._write

    def striking(*arguments: Any) -> str:
        checksum = write(*arguments)
        strike()
        return checksum

    safetensors._write = striking


def _loading(strike: Callable[[], None]) -> None:
    from dsmoe.checkpoint import dcp

    read = dcp.read_tensor

    def striking(*arguments: Any) -> object:
        strike()
        return read(*arguments)

    dcp.read_tensor = striking  # type: ignore[assignment]


PHASES = {
    "at the rendezvous": _at_rendezvous,
    "tokenising": _tokenising,
    "in a step": _in_a_step,
    "saving": _saving,
    "loading": _loading,
}


def _rank(folder: Path, rank: int, port: str, phase: str, number: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(folder)
    os.dup2(os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    from dsmoe.runtime import failure_exit, progress, rendezvous_barrier, watchdog
    from dsmoe.train import run

    watchdog.HEARTBEAT_SECONDS = 0.3  # type: ignore[misc]
    watchdog.STORE_SECONDS = rendezvous_barrier.STORE_SECONDS = progress.STORE_SECONDS = 2.0  # type: ignore[misc]
    watchdog.GRACE_SECONDS = failure_exit.GRACE_SECONDS = progress.GRACE_SECONDS = 1.0  # type: ignore[misc]
    progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS, progress.LOST_SECONDS, progress.LOG_TIMEOUT_SECONDS = (
        4.0,
        0.3,
        6.0,
        2.0,
    )  # type: ignore[misc]
    failure_exit.LINGER_SECONDS = 8.0  # type: ignore[misc]
    if rank == 0:
        PHASES[phase](lambda: os.kill(os.getpid(), number))
    code = run.main(["--config", "config.yaml"])
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("at the rendezvous", signal.SIGSTOP),
        ("at the rendezvous", signal.SIGKILL),
        ("tokenising", signal.SIGSTOP),
        ("tokenising", signal.SIGKILL),
        ("in a step", signal.SIGKILL),
        ("saving", signal.SIGSTOP),
        ("saving", signal.SIGKILL),
        ("loading", signal.SIGSTOP),
        ("loading", signal.SIGKILL),
    ],
)
def test_one_of_the_others_says_so(phase: str, number: int, tmp_path: Path) -> None:
    train = {"batch_tokens": 2 * WORLD * 32}
    own_cache = {"cache_dir": str(tmp_path / "cache")}
    limit = {"collective_timeout_seconds": 6}
    saves = {"every": 1, "asynchronous": False}
    given = {"cluster": limit, "train": train, "data": own_cache, "checkpoint": saves, "runs_dir": "runs"}
    if phase == "loading":
        write_config(tmp_path, **{**given, "train": {**train, "steps": 1}})
        assert pretrain(tmp_path, "--config", "config.yaml").code == 0
    write_config(tmp_path, ranks=WORLD, **given)
    port = free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(tmp_path, rank, port, phase, number)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks[1:]:
        process.join(200)
    codes = [process.exitcode for process in ranks[1:]]
    ranks[0].kill()
    said = "".join((tmp_path / f"{rank}.log").read_text(encoding="utf-8") for rank in range(1, WORLD))
    assert codes == [1, 1], said
    assert "Traceback" not in said
    about = [line for line in said.splitlines() if line.startswith("[rank ")]
    assert len(about) == 1, said
    assert "rank 0" in about[0]
    assert ("has ended: nobody answers" if number == signal.SIGKILL else "is stopped or hangs") in about[0]
    if phase != "at the rendezvous":
        assert re.search(r"last heard of rank 0, \d+ s ago: \w", about[0])
