"""Phases are what failure reports show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import run_ranks
from dsmoe.runtime.watchdog import Watchdog, process_watchdog
from dsmoe.train.phases import Phase, phase
from tests.helpers.small_runs import make_trainer, small_config


def phases_of_a_step(config: Config) -> list[tuple[int, str]]:
    """The notes of two steps, a log point and an evaluation; those of the MoE layer's exchanges left out."""
    trainer, noted = make_trainer(config), []
    record = Watchdog.record

    def recorded(watch: Watchdog, doing: str, step: int | None = None) -> None:
        record(watch, doing, step)
        noted.append((watch.position()[0].step, doing))

    Watchdog.record = recorded  # type: ignore[method-assign]  # this process is the test's own
    trainer.step()
    trainer.log(trainer.step())
    trainer.evaluate()
    trainer.save()
    trainer.checkpoints.flush()
    return [item for item in noted if item[1] in list(Phase)]


def test_a_step_goes_through_its_phases_for_every_micro_batch(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"batch_tokens": 2 * 32, "eval_sequences": 1})
    (noted,) = run_ranks(1, phases_of_a_step, config)
    micro_batch = ["reading data", "forward pass", "backward pass", "optimizer step"]
    steps = [(step, name) for step in (1, 2) for name in 2 * micro_batch]
    assert noted[: len(steps)] == steps
    rest = list(dict.fromkeys(name for _, name in noted[len(steps) :]))
    assert rest == ["reducing metrics", "evaluation", "saving a checkpoint"]


def fail_in_a_phase() -> tuple[str, str]:
    with pytest.raises(ValueError, match="no such"), phase(Phase.FORWARD, 7):
        raise ValueError("no such file")
    failed_in = process_watchdog().position()[0].text
    with phase(Phase.METRICS):
        dist.barrier()
    return failed_in, process_watchdog().position()[0].text


def test_an_error_is_reported_in_the_phase_that_it_left() -> None:
    assert run_ranks(1, fail_in_a_phase) == [("step 7, forward pass", "step 7, reducing metrics")]
