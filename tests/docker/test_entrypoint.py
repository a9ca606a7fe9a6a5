"""The image's entry point: the ranks that it starts, the signals that reach them, and its exit code."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config import UserError, dump_config
from dsmoe.runtime.container import rank_environments
from tests.helpers.small_runs import small_config

REPOSITORY = Path(__file__).parents[2]
ENTRYPOINT = REPOSITORY / "docker" / "entrypoint.py"

# Says who it is, then waits for a signal, unless an override tells it to end otherwise.
PROGRAM = """
import json, os, signal, sys, time
rank = os.environ.get("RANK", "none")
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT):
    signal.signal(number, lambda number, _: got.append(number))
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.write(1, json.dumps([sys.argv[1:], {key: os.environ.get(key) for key in keys}]).encode() + b"\\n")
if rank == "0":
    open("listening", "w").close()
while rank == "1" and not os.path.exists("listening"):
    time.sleep(0.01)
if rank == "1" and "name=fails" in sys.argv:
    sys.exit(3)
if rank == "1" and "name=dies" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "name=done" not in sys.argv:
    while not got:
        time.sleep(0.01)
    time.sleep(1.0 if rank == "1" else 0.3)  # the checkpoint; not all ranks end it at once
    os.write(1, f"rank {rank} got {signal.Signals(got[0]).name} {len(got)}\\n".encode())
    sys.exit(75)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The folders of an image whose `pretrain` is PROGRAM; returns its entry point."""
    for name in ("docker", "launch"):
        (tmp_path / name).mkdir()
    (tmp_path / "launch" / "pretrain.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(dump_config(small_config(tmp_path, ranks=2)), encoding="utf-8")
    return Path(shutil.copy(ENTRYPOINT, tmp_path / "docker"))


def start(image: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    plain = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "SLURM", "MASTER"))
    }
    return subprocess.Popen(
        [sys.executable, str(image), *arguments],
        env={**plain, **environment, "PYTHONPATH": str(REPOSITORY)},
        cwd=image.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        encoding="utf-8",
    )


def ranks_of(output: str) -> list[tuple[list[str], dict[str, Any]]]:
    return sorted(
        (tuple(json.loads(line)) for line in output.splitlines() if line.startswith("[[")),
        key=lambda line: line[1]["RANK"] or "",
    )


def test_all_devices_of_a_machine_alone(image: Path) -> None:
    process = start(image, "pretrain", "config.yaml", "name=done")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    (arguments, first), (_, second) = ranks_of(output)
    assert arguments == ["--config", "config.yaml", "name=done"]
    assert (first["RANK"], second["RANK"]) == (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


@pytest.mark.parametrize("node", [{"NODE_RANK": "2"}, {"JOB_COMPLETION_INDEX": "2"}])
def test_one_node_of_several(node: dict[str, str], tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, cluster={"nodes": 4})
    first, second = rank_environments(config, {**node, "MASTER_ADDR": "node0"})
    assert (first["RANK"], first["LOCAL_RANK"]) == ("4", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("5", "1")
    assert first["WORLD_SIZE"] == "8"
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("node0", "29500")
    elastic = small_config(tmp_path, ranks=2, cluster={"nodes": 4, "elastic": True})
    assert rank_environments(elastic, {**node, "MASTER_ADDR": "node0", "NNODES": "3"})[0]["WORLD_SIZE"] == "6"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"one of 2 nodes.*NODE_RANK \(0 to 1.*MASTER_ADDR"),
        ({"NODE_RANK": "1"}, "MASTER_ADDR"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "a"}, r"NODE_RANK \(2\) must be below the number of nodes"),
        ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, "NODE_RANK is 'one', and is to be a whole number"),
    ],
)
def test_a_node_that_is_not_told_which(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rank_environments(small_config(tmp_path, cluster={"nodes": 2}), environment)


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "1"},  # half of it, of which the program says what is missing
    ],
)
def test_another_launchers_rank_takes_the_place_of_the_entry_point(launcher: dict[str, str], image: Path) -> None:
    process = start(image, "pretrain", "--config", "config.yaml", **launcher)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.terminate()
    output, _ = process.communicate(timeout=30)
    (only,) = ranks_of(line + output)
    assert only[0] == ["--config", "config.yaml"]
    assert {key: value for key, value in only[1].items() if value} == {
        key: value for key, value in launcher.items() if key in only[1]
    }
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT])
def test_a_signal_reaches_every_rank_once_and_75_comes_through(number: signal.Signals, image: Path) -> None:
    process = start(image, "pretrain", "config.yaml")
    assert process.stdout is not None
    output = process.stdout.readline() + process.stdout.readline()
    os.killpg(process.pid, number)  # as a terminal does
    output += process.communicate(timeout=30)[0]
    assert process.returncode == 75, output
    assert f"rank 0 got {number.name} 1" in output
    assert f"rank 1 got {number.name} 1" in output


def test_a_terminal_that_has_gone_is_a_stop(image: Path) -> None:
    process = start(image, "pretrain", "config.yaml")
    assert process.stdout is not None
    output = process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    output += process.communicate(timeout=30)[0]
    assert process.returncode == 75, output
    assert "rank 1 got SIGTERM 1" in output


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("fails", 3, "rank 1 has ended with exit code 3"), ("dies", 128 + signal.SIGKILL, "rank 1 was killed by SIGKILL")],
)
def test_the_first_failure_ends_the_others_and_gives_its_code(how: str, code: int, said: str, image: Path) -> None:
    process = start(image, "pretrain", "config.yaml", f"name={how}")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert f"{said}; the other ranks of this node are told to stop" in output
    assert "rank 0 got SIGTERM 1" in output


@pytest.mark.parametrize("arguments", [[], [""]])
def test_nothing_to_run_is_said(arguments: list[str], image: Path) -> None:
    done = subprocess.run(
        [sys.executable, image, *arguments], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing to run; give `pretrain CONFIG")


def test_a_wrong_config_is_one_message(image: Path) -> None:
    process = start(image, "pretrain", "config.yaml", "moe.top_n=1")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert output.startswith("error: moe.top_n: unknown key")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["sh", "-c", "echo $$; exit 9"], 9, None),
        (["no-such-program"], 127, "error: no-such-program: No such file or directory\n"),
    ],
)
def test_any_other_command_takes_the_place_of_the_entry_point(
    command: Sequence[str], code: int, said: str | None, image: Path
) -> None:
    process = start(image, *command)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert output == (said or f"{process.pid}\n")


def test_ranks_that_do_not_end_are_killed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ENTRYPOINT))
    supervise = module["supervise"]
    monkeypatch.setitem(supervise.__globals__, "GRACE_SECONDS", 0.5)
    handlers = {number: signal.getsignal(number) for number in module["SIGNALS"]}
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(1 if os.environ['RANK'] == '1' else 1000); exit(4)"
    )
    try:
        assert supervise([sys.executable, "-c", stubborn], [{"RANK": "0"}, {"RANK": "1"}]) == 4
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
