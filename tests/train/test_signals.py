"""A signal to any rank stops all after the same step, with a checkpoint, and the run goes on from it."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoe.checkpoint.folder import all_checkpoints, verify
from dsmoe.config.schema import Config
from dsmoe.parallel.local import CONTEXT, run_ranks
from tests.checkpoint.runs import folder_of
from tests.train.layouts import make_trainer, small_config
from tests.train.test_run import _main_in_child, pretrain, write_config


def signalled(config: Config, number: int, rank: int, step: int) -> dict[str, Any]:
    """Train, until this rank is told to stop before a step of its own."""
    trainer = make_trainer(config)
    take_step = trainer.step

    def told() -> Any:
        if trainer.rank.rank == rank and trainer.step_index == step:
            os.kill(os.getpid(), number)
        return take_step()

    trainer.step = told  # type: ignore[method-assign]
    finished = trainer.run()
    return {"finished": finished, "step": trainer.step_index, "left": trainer.signals._answer}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(number: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2)
    results = run_ranks(2, signalled, config, int(number), 1, 3)
    assert results == [{"finished": False, "step": 5, "left": None}] * 2
    (checkpoint,) = all_checkpoints(folder_of(config))
    assert verify(checkpoint).facts.step == 5


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
