"""Whoever does not come is known by number and node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dsmoe.parallel import join_processes, leave_processes
from dsmoe.parallel.local import CONTEXT
from dsmoe.parallel.watch import LostRanksError
from dsmoe.plan import Topology
from dsmoe.preflight import meeting


def come(rank: int, port: int, seconds: float, result: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    meeting.WORD_SECONDS = 0.2
    try:
        meeting.call_roll(Topology(nodes=2, devices_per_node=2), timedelta(seconds=seconds))
        join_processes("cpu", timedelta(seconds=20))
        dist.barrier()
        result.write_text(f"rank {dist.get_rank()} has joined")
        leave_processes()
    except LostRanksError as error:
        result.write_text(str(error))


def results_of(ranks: list[int], seconds: float, folder: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=come, args=(rank, port, seconds, folder / str(rank))) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [path.read_text() for path in sorted(folder.iterdir())]


def test_all_who_come_join_afterwards(tmp_path: Path) -> None:
    assert results_of([3, 1, 0, 2], 30, tmp_path) == [f"rank {rank} has joined" for rank in range(4)]


def test_those_who_do_not_come_are_named(tmp_path: Path) -> None:
    (text,) = results_of([0], 1, tmp_path)
    assert text.startswith("3 of 4 ranks, of node 0, 1 (from 0), have not come within 1 s to 127.0.0.1:")


def test_a_node_without_the_config_says_so_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "dsmoe", "preflight", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"[rank 2 on {socket.gethostname()}] error: no such file: {tmp_path}/absent.yaml" in done.stderr
