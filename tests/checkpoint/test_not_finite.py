"""A state that is not finite is never saved over a good one, and never gone on from without a word."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.checkpoint.checkpointer import NotFiniteError
from dsmoe.checkpoint.folder import all_checkpoints, verify
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import inner_optimizer
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.summary import after_divergence
from dsmoe.train.trainer import Trainer, TrainingDivergedError
from tests.helpers.checkpoint_runs import folder_of, layout_config, logged_from_now, tensors_of
from tests.helpers.forked import Outcome, start_on_ranks
from tests.helpers.small_runs import make_trainer
from tests.train.test_run import pretrain, refused, write_config

LAYOUTS = {
    "one rank": {"ranks": 1, "zero": 0},
    "two ranks, experts over both": {"ranks": 2, "expert": 2, "zero": 1},
    "two ranks in bf16": {"ranks": 2, "zero": 2, "precision": "bf16"},
    "two ranks without ZeRO in bf16": {"ranks": 2, "zero": 0, "precision": "bf16"},
}
WRECKS = ["weight", "master", "moment", "square", "buffer", "loss"]


def wreck(trainer: Trainer, what: str, value: float) -> None:
    """Put one bad element where the rank has it."""
    engine = trainer.engine
    if what == "weight":
        next(engine.module.parameters()).data.view(-1)[-1] = value
    elif what == "buffer":
        next(x for name, x in engine.module.named_buffers() if name.endswith("balance.bias"))[0] = value
    elif what == "loss":
        trainer.meter._loss_sum[0] = value
    else:
        state = inner_optimizer(engine).state
        master = next(iter(state))
        tensor = {"master": master.data, "moment": state[master]["exp_avg"], "square": state[master]["exp_avg_sq"]}
        tensor[what].view(-1)[0] = value


def save_good_then_bad(config: Config, wrecked_rank: int, value: float) -> list[str]:
    trainer = make_trainer(config)
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    messages = []
    for what in WRECKS:
        trainer.resume(folder_of(config) / "step_00000001")
        trainer.step()
        if trainer.rank.rank == wrecked_rank:
            wreck(trainer, what, value)
        with pytest.raises(TrainingDivergedError) as error:
            trainer.save()
        messages.append(str(error.value))
    trainer.resume(folder_of(config) / "step_00000001")
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    return messages


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_bad_element_on_one_rank_keeps_the_state_from_being_saved(
    layout: str, value: float, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, **LAYOUTS[layout], checkpoint={"keep": 1, "every": 1})
    ranks = LAYOUTS[layout]["ranks"]
    for messages in run_ranks(ranks, save_good_then_bad, config, ranks - 1, value):
        assert len(messages) == len(WRECKS)
        for message in messages:
            assert message.startswith("at step 2 the loss, a weight or the optimizer's state is not finite")
            assert f"To go on from {folder_of(config)}/step_00000001, the last good checkpoint" in message
            assert "This start began with it: should a lower rate end so too, the state in it is at fault" in message
    assert [path.name for path in all_checkpoints(folder_of(config))] == ["step_00000002"]
    state = tensors_of(folder_of(config) / "step_00000002")
    assert all(bool(torch.isfinite(x).all()) for x in state.values() if x.is_floating_point())


def save_as_an_older_version_would(config: Config, upto: int, what: str) -> None:
    """Make checkpoints, the last of which has a NaN element."""
    trainer = make_trainer(config)
    for step in range(1, upto + 1):
        trainer.step()
        if step == upto:
            wreck(trainer, what, math.nan)
        trainer.checkpoints.save(step, step * config.train.batch_tokens)
    trainer.checkpoints.flush()


def resume_it(config: Config, checkpoint: Path) -> str:
    trainer = make_trainer(config)
    with pytest.raises(NotFiniteError) as error:
        trainer.resume(checkpoint)
    return str(error.value)


@pytest.mark.parametrize(("what", "named"), [("weight", "model/"), ("square", "exp_avg_sq/"), ("buffer", "buffer/")])
def test_every_rank_refuses_to_go_on_from_one_and_names_the_tensor(what: str, named: str, tmp_path: Path) -> None:
    config = layout_config(tmp_path, zero=0)
    run_ranks(1, save_as_an_older_version_would, config, 1, what)
    two = layout_config(tmp_path, 2, expert=2, zero=1)
    messages = run_ranks(2, resume_it, two, folder_of(config) / "step_00000001")
    assert len(set(messages)) == 1
    assert f"step_00000001 has a state that is not finite ({named}" in messages[0]


def test_a_run_goes_on_from_the_last_finite_one_and_says_so(tmp_path: Path) -> None:
    options = {"train": {"steps": 4}, "checkpoint": {"every": 1, "keep": 3}, "runs_dir": "runs"}
    config = str(write_config(tmp_path, **options))
    assert pretrain(tmp_path, "--config", config).code == 0
    folder = tmp_path / "runs" / "small" / "checkpoints"
    old = layout_config(tmp_path, zero=0, runs_dir=str(tmp_path / "old"), name="old", moe=small_moe(), **PLAIN)
    run_ranks(1, save_as_an_older_version_would, old, 4, "weight")
    shutil.rmtree(folder / "step_00000004")
    shutil.copytree(folder_of(old) / "step_00000004", folder / "step_00000004")
    again = pretrain(tmp_path, "--config", config)
    assert again.code == 0, again.err
    assert re.search(r"passed over: \S+/step_00000004 has a state that is not finite \(model/\S+ has NaN", again.out)
    assert "continuing from runs/small/checkpoints/step_00000003" in again.out
    assert "set aside: runs/small/checkpoints/step_00000004.damaged" in again.out
    for checkpoint in all_checkpoints(folder):
        verify(checkpoint)
    for step in (2, 3, 4):
        shutil.rmtree(folder / f"step_0000000{step}")
    shutil.copytree(folder_of(old) / "step_00000004", folder / "step_00000004")
    refused(pretrain(tmp_path, "--config", config), "has a state that is not finite")
    named = f"checkpoint.resume={folder}/step_00000004"
    other = pretrain(tmp_path, "--config", config, "name=other", named)
    refused(other, f"error: checkpoint.resume: {folder}/step_00000004 has a state that is not finite (model/")
    assert "; name an earlier checkpoint, or one of another run" in other.err
    assert other.err.count("not finite") == 1
    weights = f"checkpoint.weights_from={folder}/step_00000004"
    (folder / "step_00000002").mkdir()
    third = pretrain(tmp_path, "--config", config, "name=third", weights)
    refused(third, f"error: checkpoint.weights_from: {folder}/step_00000004 has a state that is not finite (model/")
    assert f"; name an earlier checkpoint (checkpoint.weights_from={folder}/step_00000002)" in third.err
    assert third.err.count("not finite") == 1


PLAIN: dict[str, Any] = {"model": {}, "optimizer": {}, "train": {"micro_batch_size": 1}}
"""The sections of `write_config`."""


def small_moe() -> dict[str, Any]:
    balance = {"aux_loss": 0.02, "z_loss": 0.001, "scope": "micro_batch", "bias_update_rate": 0.0}
    return {"shared_expert_ffn_size": None, "expert_ffn_size": 24, "router": {}, "balance": balance}


def test_the_advice_says_of_a_checkpoint_that_the_start_began_with_it(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    folder = folder_of(config)
    run_ranks(1, save_steps, config, 2)
    one, two = (folder / f"step_0000000{step}" for step in (1, 2))
    assert "began with it" not in after_divergence(config, folder)
    assert "began with it" not in after_divergence(config, folder, one)
    advice = after_divergence(config, folder, two)
    assert f"To go on from {two}, " in advice
    assert "This start began with it: should a lower rate end so too, the state in it is at fault. From f" in advice
    assert f"checkpoint.resume={one} " in advice
    assert f"To begin with {two} again with a lower rate" in after_divergence(config, tmp_path / "none", two)
    assert "To begin anew with a lower rate" in after_divergence(config, tmp_path / "none")


def save_steps(config: Config, steps: int) -> None:
    trainer = make_trainer(config)
    for _ in range(steps):
        trainer.step()
        trainer.save()
    trainer.checkpoints.flush()


DIVERGES = """
import os, sys, torch
from dsmoe.train import run, Trainer
step = Trainer.step
def diverging(self):
    norm = step(self)
    if self.step_index == 6 and self.plan.config.optimizer.lr == 3e-3:
        with torch.no_grad():
            list(self.model.parameters())[-1].view(-1)[0] = float("nan")
            for flat in self.engine.optimizer.single_partition_of_fp32_groups:
                flat[0] = float("nan")
    return norm
Trainer.step = diverging
os._exit(run.main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_diverged_run_advises_works(ranks: int, tmp_path: Path) -> None:
    """The run saves every step, and looks at the loss after the last one only."""
    options = {"train": {"steps": 9}, "checkpoint": {"every": 1, "keep": 3}, "observe": {"log_every": 50}}
    config = write_config(tmp_path, ranks=ranks, runs_dir="runs", **options)
    script = tmp_path / "diverges.py"
    script.write_text(DIVERGES, encoding="utf-8")

    def start(*added: str) -> Outcome:
        return start_on_ranks(ranks, tmp_path, "--config", str(config), *added, script=script)

    first = start()
    assert first.code == 1, first.err
    folder = tmp_path / "runs" / "small" / "checkpoints"
    assert [path.name for path in all_checkpoints(folder)] == ["step_00000003", "step_00000004", "step_00000005"]
    assert "Traceback" not in "".join(line for line in first.err.splitlines() if "rank" in line)
    (advice,) = set(re.findall(r"add to the same command: (optimizer\.lr=\S+) \(", first.err))
    (further,) = set(
        re.findall(r"in a folder of its own: (name=\S+ checkpoint\.resume=\S+ optimizer\.lr=\S+)", first.err)
    )
    if ranks == 1:
        earlier = start(*shlex.split(further))
        assert earlier.code == 0, earlier.err
        assert "continuing from runs/small/checkpoints/step_00000003" in earlier.out
        assert "run small-2 in" in earlier.out
    onward = start(*shlex.split(advice))
    assert onward.code == 0, onward.err
    assert "changed since the run was last started: optimizer.lr, 0.003 -> 0.0015" in onward.out
    assert "continuing from runs/small/checkpoints/step_00000005" in onward.out
    assert [path.name for path in all_checkpoints(folder)][-1] == "step_00000009"


def test_a_finite_state_from_which_every_step_is_skipped_is_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    options = {"train": {"steps": 60}, "checkpoint": {"every": 1, "keep": 2}, "observe": {"log_every": 10}}
    config = str(write_config(tmp_path, runs_dir="runs", **options))
    assert pretrain(tmp_path, "--config", config, "train.steps=3").code == 0
    outcome = pretrain(tmp_path, "--config", config, "optimizer.lr=1e30", "optimizer.grad_clip=0")
    assert outcome.code == 1
    folder = tmp_path / "runs" / "small" / "checkpoints"
    assert "because every step after it was skipped: runs/small/checkpoints/step_00000004.damaged" in outcome.out
    assert [path.name for path in all_checkpoints(folder)] == ["step_00000003"]
    assert "To go on from runs/small/checkpoints/step_00000003, the last good checkpoint" in outcome.err
    onward = pretrain(tmp_path, "--config", config, "optimizer.lr=0.001", "train.steps=6")
    assert onward.code == 0, onward.err
    assert "continuing from runs/small/checkpoints/step_00000003" in onward.out


@pytest.mark.parametrize("wrong", ["moe.balance.aux_loss=1e30", "model.init_std=1e30", "optimizer.lr=1e30"])
def test_a_run_that_ends_with_skipped_steps_alone_has_failed(wrong: str, tmp_path: Path) -> None:
    """The run is too short for the twenty skipped steps in a row that end a longer one."""
    options = {"train": {"steps": 6}, "checkpoint": {"every": 2}}
    config = str(write_config(tmp_path, runs_dir="runs", **options))
    outcome = pretrain(tmp_path, "--config", config, wrong, "optimizer.grad_clip=0", "train.steps=4")
    assert outcome.code == 1, outcome.out
    assert re.search(r", and [34] of 4 steps were skipped, the last [34] in a row, because gradients were", outcome.err)
    assert "To begin anew with a lower rate, add to the same command: " in outcome.err
    assert "what to run next" not in outcome.out
    assert all_checkpoints(tmp_path / "runs" / "small" / "checkpoints") == []


def skip_and_save(config: Config, skipped: list[int], stopped_after: int = 0) -> list[str]:
    """Train with gradients that are not finite in some steps, until a signal if one comes; return the output."""
    trainer, logged = make_trainer(config), logged_from_now()
    step = trainer.step

    def some_skipped() -> Any:
        hook = None
        if trainer.step_index + 1 in skipped:
            hook = trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        norm = step()
        if hook:
            hook.remove()
        if trainer.step_index == stopped_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    trainer.step = some_skipped  # type: ignore[method-assign]
    trainer.run()
    return [*logged, trainer.skipped_steps()]


def test_steps_that_are_skipped_push_no_good_checkpoint_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": {"steps": 9}, "checkpoint": {"every": 2, "keep": 9}}
    config = layout_config(tmp_path, observe={"log_every": 50}, **options)
    (said,) = run_ranks(1, skip_and_save, config, [2, 6, 7])
    assert said[-1] == "3 of 9 steps were skipped, because gradients were not finite"
    names = [path.name for path in all_checkpoints(folder_of(config))]
    assert names == [f"step_0000000{step}" for step in (3, 4, 8, 9)], "put off to the next step that is taken"


def test_saves_that_are_put_off_are_said_and_after_several_loudly(tmp_path: Path) -> None:
    checkpoint = {"every": 2, "keep": 9, "asynchronous": False}
    options: dict[str, Any] = {"train": {"steps": 14}, "checkpoint": checkpoint}
    config = layout_config(tmp_path, 2, observe={"log_every": 50}, **options)
    logged, other = run_ranks(2, skip_and_save, config, [4, *range(6, 11), 14])
    said = [line for line in logged if "put off" in line]
    reason = "is put off, because steps are skipped (gradients are not finite), until one is taken"
    assert said[0] == f"the save after step 4 {reason}; the last checkpoint is of step 2"
    assert said[1] == f"the save after step 6 {reason}; the last checkpoint is of step 5"
    assert len(said) == 4
    for step, saves, line in ((8, 2, said[2]), (10, 3, said[3])):
        assert line.startswith(f"the save after step {step} {reason}; the last checkpoint is of step 5. NO NEW CHECK")
        assert "NO NEW CHECKPOINT SINCE STEP 5 (20" in line
        assert f"): {saves} saves in a row put off while steps were skipped, and what was trained since then" in line
    assert not [line for line in other if "put off" in line]
    assert [path.name for path in all_checkpoints(folder_of(config))][-2:] == ["step_00000012", "step_00000014"]


@pytest.mark.parametrize("stopped_after", [0, 5], ids=["the last step", "a signal"])
def test_an_end_while_steps_are_skipped_is_saved_and_pushes_no_good_checkpoint_out(
    stopped_after: int, tmp_path: Path
) -> None:
    last = 8 if stopped_after else 6
    options: dict[str, Any] = {"train": {"steps": last}, "checkpoint": {"every": 1, "keep": 2}}
    config = layout_config(tmp_path, observe={"log_every": 50}, **options)
    run_ranks(1, skip_and_save, config, [4, 5, 6, 7, 8], stopped_after)
    names = [path.name for path in all_checkpoints(folder_of(config))]
    assert names == ["step_00000002", "step_00000003", "step_00000006"], (
        "one more than keep, for as long as it may be bad"
    )
    newest = verify(folder_of(config) / "step_00000006").facts
    assert (newest.skipped_steps, newest.schedule_step) == (3, 3)
    before, after = (tensors_of(folder_of(config) / name) for name in names[1:])
    assert all(torch.equal(after[key], x) for key, x in before.items() if key.startswith(("model/", "exp_avg")))
