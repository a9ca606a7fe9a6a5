"""Joining the processes of a run, and running work on some of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError, describe, keep_place, located
from dsmoe.runtime.atomic_files import write_whole
from dsmoe.runtime.processes import (
    HostError,
    _rendezvous_problem,
    _use_interface,
    is_shared,
    join_processes,
    leave_processes,
    run_on_all_ranks,
    run_on_rank_0,
    set_group_timeouts,
)
from dsmoe.runtime.spawn import CONTEXT, run_ranks


def test_cuda_without_a_device_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"cluster\.device: cpu"):
        join_processes("cuda")


def test_an_interface_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    with pytest.raises(HostError, match=r"cluster\.interface \(eth99\) .* \(.*\blo\b.*\)"):
        join_processes("cpu", interface="eth99")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    _use_interface("lo")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("=lo", "eth7")  # this host's own


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    lost = dist.DistNetworkError("timed out")
    assert "rank 0 came to 10.0.0.1:1, where the ranks meet, and does not answer" in str(_rendezvous_problem(lost))
    assert "port 1 is in use" in str(_rendezvous_problem(dist.DistNetworkError("EADDRINUSE")))


def join_alone(result: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    rank = join_processes("cpu")
    again = join_processes("cpu")
    assert rank == again
    assert rank.is_first
    assert (rank.rank, rank.world_size, rank.device) == (0, 1, torch.device("cpu"))
    dist.all_reduce(torch.ones(1))
    leave_processes()
    leave_processes()
    assert not dist.is_initialized()
    result.write_text("joined and left", encoding="utf-8")


def test_a_single_process_needs_no_launcher(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=join_alone, args=(tmp_path / "result",))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "result").read_text(encoding="utf-8") == "joined and left"


def test_every_rank_knows_who_it_is() -> None:
    ranks = run_ranks(2, join_processes, "cpu")
    assert [(rank.rank, rank.local_rank, rank.world_size, rank.is_first) for rank in ranks] == [
        (0, 0, 2, True),
        (1, 1, 2, False),
    ]


def ask_first_rank(folder: Path) -> tuple[object, str, str]:
    def act() -> dict[str, int]:
        time.sleep(0.2)  # the others must wait
        with (folder / "calls").open("a", encoding="utf-8") as file:
            file.write(f"rank {dist.get_rank()}\n")
        return {"answer": 42}

    def fail() -> None:
        raise UserError("train.steps is missing")

    value = run_on_rank_0(act)
    seen = (folder / "calls").read_text(encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_on_rank_0(fail)
    return value, seen, str(error.value)


def test_result_and_error_of_the_first_rank_reach_every_rank(tmp_path: Path) -> None:
    for value, seen, error in run_ranks(3, ask_first_rank, tmp_path):
        assert value == {"answer": 42}
        assert seen == "rank 0\n"
        assert error == "train.steps is missing"


def wait_longer_than_a_collective_may() -> str:
    set_group_timeouts(timedelta(seconds=2))
    return run_on_rank_0(lambda: time.sleep(4) or "done")


def test_the_others_wait_for_the_first_rank_without_a_timeout() -> None:
    assert run_ranks(2, wait_longer_than_a_collective_may) == ["done", "done"]


def fail_on_one_rank() -> str:
    def act() -> None:
        if dist.get_rank() == 1:
            raise UserError("no room on rank 1")

    with pytest.raises(UserError, match="no room on rank 1") as caught:
        run_on_all_ranks(act)
    assert is_shared(caught.value)
    return str(run_on_all_ranks(dist.get_rank))


def test_one_ranks_error_is_everybodys() -> None:
    assert run_ranks(2, fail_on_one_rank) == ["[0, 1]", "[0, 1]"]


def meet_a_full_disk(error: Exception) -> tuple[str, str]:
    def act() -> None:
        if dist.get_rank() == 1:
            write_whole(Path("/none/such/file"), "") if isinstance(error, OSError) else raise_it(error)

    with pytest.raises(type(error)) as caught:
        run_on_all_ranks(act)
    raised = caught.value
    text = located(raised) if isinstance(raised, OSError) else str(raised)
    return text, "".join(traceback.format_exception(raised))


def raise_it(error: Exception) -> None:
    raise error


def test_an_error_of_another_rank_comes_with_its_line_and_its_traceback() -> None:
    for text, printed in run_ranks(2, meet_a_full_disk, FileNotFoundError()):
        assert re.fullmatch(
            r"/none/such/\S+: No such file or directory \(dsmoe/runtime/atomic_files\.py:\d+, on rank 1 \(\S+\)\)", text
        )
        assert "in write_whole" in printed
    for text, printed in run_ranks(2, meet_a_full_disk, RuntimeError("a bug")):
        assert text == "a bug"
        assert "raised on rank 1 (" in printed
        assert "in raise_it" in printed


def test_an_error_of_the_user_stays_as_it_is() -> None:
    error = UserError("bad")
    keep_place(error, "on rank 1")
    assert not hasattr(error, "__notes__")
    assert describe(OSError(28, "No space left on device", "a", None, "b")) == "a -> b: No space left on device"


def sleep_for_ever(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(3600)


STARTS = """
import sys
from dsmoe.runtime.spawn import run_ranks
from tests.runtime.test_processes import sleep_for_ever
if __name__ == "__main__":
    run_ranks(2, sleep_for_ever, sys.argv[1], timeout=3600)
"""


def test_ranks_of_this_machine_end_with_the_process_that_has_started_them(tmp_path: Path) -> None:
    """As `dsmoe parity` does; nobody would see them train on."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "starts.py").write_text(STARTS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "starts.py"), str(tmp_path / "ranks")], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(ranks := list((tmp_path / "ranks").iterdir())) < 2:
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    processes = []
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(rank.name)))
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
