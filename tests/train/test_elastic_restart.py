"""`cluster.elastic`: the same command on other numbers of ranks goes on, and torchrun does that by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dsmoe.config import dump_config
from tests.helpers.forked import start_on_ranks
from tests.helpers.ports import free_port
from tests.helpers.small_runs import small_config

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = str(REPOSITORY / "launch" / "pretrain.py")
STEPS = 40
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart of gloo ranks fails (pytorch #135712)
}


def write_config(folder: Path, steps: int) -> Path:
    cluster = {"nodes": 2, "devices_per_node": 2, "elastic": True, "collective_timeout_seconds": 30}
    sections = {"train": {"steps": steps}, "checkpoint": {"every": 10}, "cluster": cluster}
    path = folder / "config.yaml"
    path.write_text(dump_config(small_config(folder, expert=4, **sections)), encoding="utf-8")
    return path


def losses(folder: Path) -> list[float]:
    """By step; a step that was done again counts as it was the last time."""
    lines = map(json.loads, (folder / "runs" / "small" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    by_step = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    return [loss for _, loss in sorted(by_step.items())]


def train(folder: Path, ranks: int, steps: int) -> str:
    """What a start on so many ranks prints."""
    done = start_on_ranks(ranks, folder, "--config", str(write_config(folder, steps)))
    assert done.code == 0, done.out + done.err
    return done.out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, 1, STEPS)
    return losses(folder)


def test_a_run_goes_on_on_more_and_on_fewer_ranks(undisturbed: list[float], tmp_path: Path) -> None:
    adjusted = [
        "elastic: cluster.nodes 2 -> 1; parallel.expert 4 -> 2",
        "elastic: cluster.nodes 2 -> 1; cluster.devices_per_node 2 -> 4",
        "elastic: cluster.nodes 2 -> 1; cluster.devices_per_node 2 -> 1; parallel.expert 4 -> 1",
    ]
    for ranks, steps, said in zip((2, 4, 1), (2, 4, 6), adjusted, strict=True):
        assert said in train(tmp_path, ranks, steps)
    assert losses(tmp_path) == pytest.approx(undisturbed[:6], rel=1e-5)


@contextmanager
def agent(folder: Path, config: Path, number: int, port: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node's torchrun, with one rank; 1 or 2 nodes may be there."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    # The node where the ranks meet has to stay: a scheduler's requeue is for that one.
    wait = [f"--rdzv-conf=is_host={number == 0},last_call_timeout=3,join_timeout=120"]
    command = ["torchrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous, *wait]
    with (folder / f"agent_{number}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, PRETRAIN, "--config", str(config)],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The agent and its rank, which has a session of its own, at once, as a node goes."""
    with suppress(psutil.NoSuchProcess):
        agent = psutil.Process(process.pid)
        for one in [*agent.children(recursive=True), agent]:
            one.kill()
    process.wait()


@pytest.mark.slow
def test_torchrun_goes_on_without_a_node_that_has_gone(undisturbed: list[float], tmp_path: Path) -> None:
    config = write_config(tmp_path, STEPS)
    saved = tmp_path / "runs" / "small" / "checkpoints" / "step_00000010"
    port = free_port()
    with agent(tmp_path, config, 0, port) as stays, agent(tmp_path, config, 1, port) as goes:
        deadline = time.monotonic() + 120
        while not saved.exists():
            assert time.monotonic() < deadline, (tmp_path / "agent_0.log").read_text(encoding="utf-8")
            time.sleep(0.05)
        kill(goes)
        assert stays.wait(200) == 0, (tmp_path / "agent_0.log").read_text(encoding="utf-8")
    log = (tmp_path / "agent_0.log").read_text(encoding="utf-8")
    assert "elastic: cluster.devices_per_node 2 -> 1; parallel.expert 4 -> 2" in log
    assert "elastic: cluster.nodes 2 -> 1; cluster.devices_per_node 2 -> 1; parallel.expert 4 -> 1" in log
    assert "continuing from" in log
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-5)
