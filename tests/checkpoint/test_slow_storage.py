"""Storage that hangs, or a rank that is gone, while checkpoints are written or read: real ranks say which and where."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from dsmoe.checkpoint import dcp, retention, safetensors
from dsmoe.checkpoint.folder import all_checkpoints, verify
from dsmoe.config.schema import Config
from dsmoe.runtime import progress, watchdog
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.spawn import run_ranks
from dsmoe.runtime.watchdog import Watchdog, process_watchdog
from tests.helpers.checkpoint_runs import folder_of, layout_config, logged_from_now
from tests.helpers.ports import free_port
from tests.helpers.small_runs import make_trainer
from tests.helpers.waiting import until
from tests.train.test_run import write_config

HOST = os.uname().nodename


def shorten_minutes(log_seconds: float = 30.0) -> None:
    """Let rank 0 have `log_seconds` more than a minute to speak, before others do: a busy machine is no silent rank."""
    watchdog.HEARTBEAT_SECONDS = 0.1
    progress.GRACE_SECONDS, progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS, progress.LOST_SECONDS = (
        0.5,
        0.6,
        0.1,
        6.0,
    )
    progress.LOG_TIMEOUT_SECONDS = log_seconds


def lines_of(logged: list[str]) -> list[str]:
    return [line for line in logged if " s so far. " in line]


HANGS: dict[str, tuple[Any, str]] = {
    "a write": (safetensors, "_write"),
    "the manifest": (dcp, "write_synced"),
    "removing what is left": (dcp, "remove_leftovers"),
    "removing an old one": (retention, "_remove_folder"),
    "a read": (dcp, "read_tensor"),
    "a checksum": (hashlib, "file_digest"),
}


def hang(what: str, hanging: bool, release: Path) -> None:
    """Let an operation wait until a file is there, if it is to hang on this rank."""
    owner, name = HANGS[what]
    operation = getattr(owner, name)

    def wait(*arguments: Any, **options: Any) -> Any:
        if what == "a write" and hanging:
            arguments[-1](1000)  # it has begun
        while hanging and not release.exists():
            time.sleep(0.02)
        return operation(*arguments, **options)

    setattr(owner, name, wait)


def release_when_said(logged: list[str], parts: list[str], times: int, release: Path) -> None:
    """Let what hangs go on when so many lines have all the parts, or will not come: who waits for them looks."""

    def wait() -> None:
        with suppress(AssertionError):
            until(lambda: sum(all(part in line for part in parts) for line in lines_of(logged)) >= times)
        release.touch()

    threading.Thread(target=wait, daemon=True).start()


def save_while_it_hangs(config: Config, what: str, hanging_rank: int, said: list[str], release: Path) -> list[str]:
    """Saves, of which the second hangs until rank 0 has said so twice."""
    shorten_minutes()
    trainer, logged = make_trainer(config), logged_from_now()
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    logged.clear()  # a busy machine may have made that one slow, too
    trainer.step()
    hang(what, trainer.rank.rank == hanging_rank, release)
    if trainer.rank.rank == 0:
        release_when_said(logged, said, 2, release)
    trainer.save()
    trainer.checkpoints.finish()
    return lines_of(logged)


@pytest.mark.parametrize(
    ("what", "hanging_rank", "is_asynchronous", "said"),
    [
        ("a write", 1, True, f"rank 1 on {HOST}: 0.00 of 0."),
        ("a write", 0, False, f"rank 0 on {HOST}: 0.00 of 0."),
        ("a write", 1, False, f"rank 1 on {HOST}: 0.00 of 0."),
        ("the manifest", 0, True, f"rank 0 on {HOST}: writing manifest.json"),
        ("removing what is left", 0, False, f"rank 0 on {HOST}: removing what earlier saves have left"),
        ("removing an old one", 0, True, f"rank 0 on {HOST}: removing older checkpoints"),
    ],
)
def test_a_save_that_hangs_is_said_with_the_rank_the_file_and_the_bytes(
    what: str, hanging_rank: int, is_asynchronous: bool, said: str, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, 2, checkpoint={"asynchronous": is_asynchronous, "keep": 1})
    wanted = ["saving step_00000002 has taken ", said]
    if what == "a write":
        wanted += [
            f" MB, at rank_{hanging_rank:05d}_000.safetensors",
            f"rank {1 - hanging_rank} on {HOST}: all written",
        ]
    results = run_ranks(2, save_while_it_hangs, config, what, hanging_rank, wanted, tmp_path / "release")
    assert sum(all(part in line for part in wanted) for line in results[0]) >= 2
    assert results[1] == [], "rank 0 has said it"
    assert [path.name for path in all_checkpoints(folder_of(config))] == ["step_00000002"]
    verify(folder_of(config) / "step_00000002")


def load_while_it_hangs(config: Config, what: str, said: list[str], release: Path) -> list[str]:
    shorten_minutes()
    trainer, logged = make_trainer(config), logged_from_now()
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    hang(what, trainer.rank.rank == 1, release)
    if trainer.rank.rank == 0:
        release_when_said(logged, said, 1, release)
    trainer.resume(folder_of(config) / "step_00000001")
    return lines_of(logged)


@pytest.mark.parametrize(("what", "doing"), [("a read", "loading"), ("a checksum", "verifying")])
def test_a_load_that_hangs_is_said_with_the_rank_and_the_file(what: str, doing: str, tmp_path: Path) -> None:
    config = layout_config(tmp_path, 2)
    all_done = f"rank 0 on {HOST}: all {'read' if doing == 'loading' else 'verified'}"
    wanted = [f"{doing} step_00000001 has taken ", f"rank 1 on {HOST}: 0.00 of 0.", "_000.safetensors", all_done]
    first, _ = run_ranks(2, load_while_it_hangs, config, what, wanted, tmp_path / "release")
    assert any(all(part in line for part in wanted) for line in first), first


def freeze_between_beats(now: Watchdog, reading: threading.Lock, kind: str = "save") -> None:
    """Stop this process, but not while one of its threads has the lock of the store, which is a file here."""
    publish = now._publish

    def stop() -> None:
        now._publish = publish  # type: ignore[method-assign]
        with now._publishing, reading:
            os.kill(os.getpid(), signal.SIGSTOP)
        now.jobs[kind].lost_error = LostRanksError("the other has given up")  # type: ignore[attr-defined]

    now._publish = stop  # type: ignore[method-assign]
    until(lambda: now._publish is publish or now._publish == publish)


def wake(process: int) -> None:
    """Let a process go on that stops itself, maybe only later: on a busy machine it may be taken for gone before."""
    until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)
    os.kill(process, signal.SIGCONT)


def lock_reading() -> threading.Lock:
    """A lock that this process has while it reads the store."""
    read, reading = progress._ProgressMonitor._read, threading.Lock()

    def read_alone(*arguments: Any) -> Any:
        with reading:
            return read(*arguments)

    progress._ProgressMonitor._read = read_alone  # type: ignore[method-assign]
    return reading


def freeze_while_saving(config: Config, frozen_rank: int) -> dict[str, Any]:
    """One rank stops as a whole, as on a host that has lost its network; the other goes on when it has been told so."""
    shorten_minutes(1.0)
    trainer, logged = make_trainer(config), logged_from_now()
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    write, reading = safetensors._write, lock_reading()

    def freeze(*arguments: Any) -> str:
        if trainer.rank.rank == frozen_rank:
            freeze_between_beats(process_watchdog(), reading)
        return write(*arguments)

    safetensors._write = freeze
    trainer.step()
    error = None
    try:
        trainer.save()
        trainer.checkpoints.finish()
    except LostRanksError as lost:
        error = str(lost)
    if trainer.rank.rank != frozen_rank:
        wake(numbers[frozen_rank])
    return {"error": error, "logged": logged}


@pytest.mark.parametrize(("frozen_rank", "is_asynchronous"), [(1, True), (0, False), (1, False)])
def test_a_rank_that_is_gone_ends_the_save_and_is_named(
    frozen_rank: int, is_asynchronous: bool, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, 2, checkpoint={"asynchronous": is_asynchronous})
    other = run_ranks(2, freeze_while_saving, config, frozen_rank)[1 - frozen_rank]
    file = f"rank_{frozen_rank:05d}_000.safetensors"
    assert other["error"].startswith(
        f"saving step_00000001: rank {frozen_rank} on {HOST} is gone, with no sign of life"
    )
    assert f"MB, at {file}" in other["error"] or "waiting to begin" in other["error"]  # what the last beat said
    assert other["error"] in other["logged"]
    assert any(f"rank {frozen_rank} on {HOST}: no sign of life for " in line for line in lines_of(other["logged"]))


def freeze_while_loading(config: Config, frozen_rank: int) -> dict[str, Any]:
    shorten_minutes(1.0)
    trainer, logged = make_trainer(config), logged_from_now()
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    trainer.step()
    trainer.save()
    trainer.checkpoints.finish()
    read, reading = dcp.read_tensor, lock_reading()

    def freeze(*arguments: Any) -> Any:
        if trainer.rank.rank == frozen_rank and threading.current_thread().name == "dsmoe waiting":
            dcp.read_tensor = read
            freeze_between_beats(process_watchdog(), reading, "load")
        return read(*arguments)

    dcp.read_tensor = freeze
    error = None
    try:
        trainer.resume(folder_of(config) / "step_00000001")
    except LostRanksError as lost:
        error = str(lost)
    if trainer.rank.rank != frozen_rank:
        wake(numbers[frozen_rank])
    return {"error": error, "logged": logged}


@pytest.mark.parametrize("frozen_rank", [1, 0])
def test_a_rank_that_is_gone_ends_a_load_and_is_named(frozen_rank: int, tmp_path: Path) -> None:
    config = layout_config(tmp_path, 2)
    other = run_ranks(2, freeze_while_loading, config, frozen_rank)[1 - frozen_rank]
    assert other["error"].startswith(
        f"loading step_00000001: rank {frozen_rank} on {HOST} is gone, with no sign of life"
    )
    assert other["error"] in other["logged"]


FREEZES = """
import os, signal, sys, time
from dsmoe.checkpoint import safetensors
from dsmoe.runtime import progress, watchdog
from dsmoe.train import run
watchdog.HEARTBEAT_SECONDS = 0.1
watchdog.STORE_SECONDS = progress.STORE_SECONDS = 2.0
progress.GRACE_SECONDS, progress.LOG_INTERVAL_SECONDS, progress.POLL_SECONDS = 0.5, 1.0, 0.2
progress.LOST_SECONDS, progress.LOG_TIMEOUT_SECONDS = 8.0, 1.0
write = safetensors._write
def freeze(*arguments):
    if os.environ["RANK"] == sys.argv.pop():
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGSTOP)
    return write(*arguments)
safetensors._write = freeze
os._exit(run.main(sys.argv[1:-1]))
"""


@pytest.mark.slow
def test_a_run_ends_by_itself_when_rank_0_stands_still_in_a_save_and_the_store_of_all_with_it(tmp_path: Path) -> None:
    """In real processes."""
    checkpoint = {"every": 1, "asynchronous": False}
    config = write_config(tmp_path, ranks=2, runs_dir="runs", train={"steps": 3}, checkpoint=checkpoint)
    (tmp_path / "freezes.py").write_text(FREEZES, encoding="utf-8")
    world = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = free_port()
    command = [sys.executable, "freezes.py", "--config", str(config), "0"]
    ranks = []
    for rank in ("0", "1"):
        environment = {**world, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        output = (tmp_path / f"output_{rank}").open("wb")
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output))
    try:
        assert ranks[1].wait(150) == 1
    finally:
        ranks[0].kill()
    text = (tmp_path / "output_1").read_text(encoding="utf-8")
    address = f"127.0.0.1:{world['MASTER_PORT']}, where the ranks meet; last heard of rank 0, "
    gone = f"rank 0 on {HOST} is stopped or hangs: somebody listens, and does not answer, at {address}"
    assert re.search(rf"saving step_00000001 has taken \d+ s so far. {re.escape(gone)}\d+ s ago", text)
    assert f"saving step_00000001: {gone}" in text
    assert "Traceback" not in text
