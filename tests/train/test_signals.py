"""A signal to any rank stops all after the same step, with a checkpoint, and the run goes on from it."""

from __future__ import annotations

import os
import pty
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsmoe.checkpoint.folder import all_checkpoints, verify
from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import CONTEXT, run_ranks
from tests.helpers.checkpoint_runs import folder_of
from tests.helpers.ports import free_port
from tests.helpers.small_runs import make_trainer, small_config
from tests.train.test_run import REPOSITORY, _main_in_child, pretrain, write_config

PRETRAIN = REPOSITORY / "launch" / "pretrain.py"


def signalled(config: Config, number: int, rank: int, step: int, ignored: bool = False) -> dict[str, Any]:
    """Train, until this rank is told to stop before a step of its own."""
    if number == signal.SIGHUP and not ignored:
        signal.signal(number, signal.SIG_DFL)  # the tests may have been started under nohup
    trainer = make_trainer(config)
    take_step = trainer.step

    def told() -> Any:
        if trainer.rank.rank == rank and trainer.step_index == step:
            os.kill(os.getpid(), number)
        return take_step()

    trainer.step = told  # type: ignore[method-assign]
    finished = trainer.run()
    return {"finished": finished, "step": trainer.step_index, "left": trainer.signals._answer}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(number: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2)
    results = run_ranks(2, signalled, config, int(number), 1, 3)
    assert results == [{"finished": False, "step": 5, "left": None}] * 2
    (checkpoint,) = all_checkpoints(folder_of(config))
    assert verify(checkpoint).facts.step == 5


def under_nohup(config: Config) -> dict[str, Any]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return signalled(config, int(signal.SIGHUP), 0, 3, ignored=True)


def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"steps": 6})
    assert run_ranks(1, under_nohup, config) == [{"finished": True, "step": 6, "left": None}]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, train={"steps": 4})
    assert (
        run_ranks(2, signalled, config, int(signal.SIGTERM), 0, 3) == [{"finished": True, "step": 4, "left": None}] * 2
    )


def test_the_command_ends_with_75_and_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 2000}, runs_dir="runs"))
    log = tmp_path / "runs" / "small" / "train.log"
    with tempfile.TemporaryDirectory() as streams:
        process = CONTEXT.Process(target=_main_in_child, args=(str(tmp_path), ["--config", config], streams))
        process.start()
        deadline = time.monotonic() + 60
        while not (log.exists() and "step 3/2000" in log.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 75, (Path(streams) / "err").read_text(encoding="utf-8")
    (checkpoint,) = all_checkpoints(tmp_path / "runs/small/checkpoints")
    step = verify(checkpoint).facts.step
    assert f"stopped after step {step}; run the same command again" in log.read_text(encoding="utf-8")
    again = pretrain(tmp_path, "--config", config, f"train.steps={step + 2}")
    assert again.code == 0, again.err
    assert f"continuing from runs/small/checkpoints/{checkpoint.name}" in again.out


def _on_terminal(terminal: str, folder: str, arguments: list[str]) -> None:
    """launch/pretrain.py as the first process of a terminal's session."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    descriptor = os.open(terminal, os.O_RDWR)
    for stream in range(3):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    sys.argv = [str(PRETRAIN), *arguments]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def test_a_terminal_that_hangs_up_leaves_a_checkpoint_and_75(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 100_000}, runs_dir="runs"))
    ours, theirs = pty.openpty()
    process = CONTEXT.Process(target=_on_terminal, args=(os.ttyname(theirs), str(tmp_path), ["--config", config]))
    process.start()
    said = b""
    while b"step 3/" not in said:
        said += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    process.join(60)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 75
    (checkpoint,) = all_checkpoints(tmp_path / "runs/small/checkpoints")
    step = verify(checkpoint).facts.step
    log = (tmp_path / "runs/small/train.log").read_text(encoding="utf-8")
    assert "SIGHUP: saving a checkpoint" in log
    assert f"stopped after step {step}; run the same command again" in log


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, ranks=2, expert=2, train={"steps": 100_000}, runs_dir="runs"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    with (tmp_path / "output").open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            [*torchrun, str(PRETRAIN), "--config", config], cwd=tmp_path, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 120
        while "step 3/" not in (said := (tmp_path / "output").read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
    finally:
        launcher.kill()  # SIGKILL, which it can tell nobody of
    _, living = psutil.wait_procs(ranks, timeout=60)
    for rank in living:
        rank.kill()
    launcher.wait()
    said = (tmp_path / "output").read_text(encoding="utf-8")
    assert not living, said
    assert said.count("the launcher has gone (torch.distributed.run, process ") == 1, said
    assert "Traceback" not in said
    (checkpoint,) = all_checkpoints(tmp_path / "runs/small/checkpoints")
    assert f"stopped after step {verify(checkpoint).facts.step}; run the same command again" in said
