"""A step whose loss or gradients are not finite, on any rank, changes nothing: as if its batch had never been there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsmoe import Groups, Topology
from dsmoe.checkpoint.folder import all_checkpoints
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import fragments, inner_optimizer
from dsmoe.engine.update_guard import UpdateGuard
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train import Trainer
from dsmoe.train.initialize import initialize
from dsmoe.train.trainer import TrainingDivergedError
from tests.helpers.small_runs import make_trainer, small_config

BALANCE = {"aux_loss": 0.02, "z_loss": 0.001, "scope": "global", "bias_update_rate": 0.01}


def guarded_config(folder: Path, zero_stage: int, precision: str, offload: bool = False) -> Config:
    """Two micro-batches for each of two ranks in a step, experts over both, and all that a step can change."""
    return small_config(
        folder,
        ranks=2,
        expert=2,
        zero_stage=zero_stage,
        train={"precision": precision, "batch_tokens": 4 * 32, "steps": 2 * len(FAULTS) + 1},
        moe={"balance": BALANCE},
        optimizer={"schedule": "linear", "warmup_steps": 4, "offload": offload},
    )


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step changes on this rank: weights, buffers, masters, Adam's state and the learning rate."""
    engine = trainer.engine
    tensors = trainer.model.state_dict()
    for number, fragment in enumerate(fragments(engine)):
        tensors[f"master/{number}"] = fragment.view(fragment.master)
        for name, moment in inner_optimizer(engine).state[fragment.master].items():
            tensors[f"{name}/{number}"] = moment
    tensors["rate"] = torch.tensor(inner_optimizer(engine).param_groups[0]["lr"])
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bad_loss(trainer: Trainer, value: float) -> Callable[[], None]:
    """The second micro-batch's loss of one token is `value`, which that token's gradient does not know."""
    calls: list[None] = []

    def forward(_: Any, __: Any, losses_BS: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return losses_BS.index_fill(1, torch.tensor([3]), value) if len(calls) == 2 else losses_BS

    return trainer.model.register_forward_hook(forward).remove


def bad_gradient(trainer: Trainer, name: str, value: float) -> Callable[[], None]:
    weight = next(p for n, p in trainer.model.named_parameters() if name in n)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    return weight.register_hook(spoil).remove


FAULTS: dict[str, Callable[[Trainer], Callable[[], None]]] = {
    "a loss is NaN": lambda trainer: bad_loss(trainer, math.nan),
    "a loss is infinite": lambda trainer: bad_loss(trainer, math.inf),
    "an expert's gradient is infinite": lambda trainer: bad_gradient(trainer, ".experts.", math.inf),
    "a dense gradient is NaN": lambda trainer: bad_gradient(trainer, "blocks.0.ffn", math.nan),
    "the norm overflows": lambda trainer: bad_gradient(trainer, ".experts.", 3e38),
}


def train(config: Config, bad: dict[int, str], *, leave_out: bool) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Steps of which those of `bad` have a fault on rank 1, or, to compare, do not take place: the state after each."""
    trainer, states = make_trainer(config), []
    for step in range(config.train.steps):
        if step in bad and leave_out:
            trainer.step_index += 1
        else:
            undo = FAULTS[bad[step]](trainer) if step in bad and dist.get_rank() == 1 else lambda: None
            trainer.step()
            undo()
        assert trainer._count_skips() == int(step in bad and not leave_out)
        states.append(state_of(trainer))
    return states, trainer.engine.skipped_steps


CASES = [(stage, precision, False) for stage in (0, 1, 2) for precision in ("fp32", "bf16")]
CASES += [(1, "fp32", True), (2, "bf16", True)]


@pytest.mark.parametrize(("zero_stage", "precision", "offload"), CASES)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(
    zero_stage: int, precision: str, offload: bool, tmp_path: Path
) -> None:
    """Every fault by itself, with a good step before and after it."""
    bad = {2 * number + 1: fault for number, fault in enumerate(FAULTS)}
    config = guarded_config(tmp_path, zero_stage, precision, offload)
    with_faults = run_ranks(2, partial(train, leave_out=False), config, bad)
    without = run_ranks(2, partial(train, leave_out=True), config, bad)
    for (states, skipped), (others, none) in zip(with_faults, without, strict=True):
        assert (skipped, none) == (len(FAULTS), 0)
        for step, (state, other) in enumerate(zip(states, others, strict=True)):
            changed = [name for name, tensor in other.items() if not torch.equal(tensor, state[name])]
            assert changed == [], f"step {step}: {bad.get(step, 'after it')}"


def skip_from(config: Config, first: int) -> tuple[str, list[str]]:
    """A run whose gradients are infinite from step `first` on; what ends it, and what it has saved."""
    trainer = make_trainer(config)
    step = trainer.step

    def spoilt() -> Any:
        if trainer.step_index + 1 == first:
            bad_gradient(trainer, "blocks.0.ffn", math.inf)
        return step()

    trainer.step = spoilt  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError) as error:
        trainer.run()
    return str(error.value), [path.name for path in all_checkpoints(trainer.checkpoints.folder)]


def test_without_zero_the_host_hears_in_time_of_steps_that_only_the_device_knows(tmp_path: Path) -> None:
    """At saves, which are put off, and at log points, the first of which after 20 skipped steps ends the run."""
    train = {"steps": 60, "batch_tokens": 2 * 32}
    config = small_config(
        tmp_path, zero_stage=0, train=train, checkpoint={"every": 2, "keep": 9}, observe={"log_every": 15}
    )
    ((error, saved),) = run_ranks(1, skip_from, config, 6)
    assert error.startswith("at step 30 the loss is ")
    assert "the gradient norm inf, and 25 of 30 steps were skipped, the last 25 in a row" in error
    assert saved == ["step_00000002", "step_00000004"]


def own_loop(config: Config, bad: int, *, leave_out: bool) -> tuple[list[float], int]:
    """The weights and the skipped steps of a loop that does not know of the guard."""
    torch.manual_seed(0)
    model = nn.Linear(32, 1)
    engine, *_ = initialize(model=model, config=config, groups=Groups(Topology.from_config(config)))
    for step in range(5):
        if step == bad and leave_out:
            continue
        loss = engine(torch.full((1, 32), 1.0 + step)).sum() * (math.inf if step == bad else 1.0)
        engine.backward(loss)
        engine.step()
    return model.weight.flatten().tolist(), engine.skipped_steps


def test_a_loop_of_ones_own_needs_nothing_of_the_guard(tmp_path: Path) -> None:
    """A skipped step is heard of one step late, and the learning rate is right when it is used."""
    optimizer = {"schedule": "linear", "warmup_steps": 4}
    config = small_config(tmp_path, zero_stage=0, train={"batch_tokens": 32}, optimizer=optimizer)
    ((weights, skipped),) = run_ranks(1, partial(own_loop, leave_out=False), config, 2)
    ((expected, none),) = run_ranks(1, partial(own_loop, leave_out=True), config, 2)
    assert weights == expected
    assert (skipped, none) == (1, 0)


class CopyEvent:
    """An event of a device on which a copy has ended only when somebody waits."""

    def __init__(self, on_host: torch.Tensor) -> None:
        self.on_host, self.calls = on_host, ""

    def record(self) -> None:
        self.calls += "record "
        self.copied = self.on_host.clone()
        self.on_host.fill_(not self.copied)

    def synchronize(self) -> None:
        self.calls += "synchronize "
        self.on_host.copy_(self.copied)


@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_on_a_gpu_the_host_waits_for_its_copy_and_only_when_it_settles(norm: float) -> None:
    weight = nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 + step)
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"), lr_scheduler=scheduler, skipped_steps=0, was_step_applied=lambda: True
    )
    guard = UpdateGuard(engine)
    guard._on_host = torch.tensor(False)
    event = guard._copied = CopyEvent(guard._on_host)  # type: ignore[assignment]
    weight.grad = torch.ones(1)
    guard.stop_unless_finite(adam, torch.tensor(norm))
    adam.step()
    scheduler.step()
    assert (weight.item() == 1.0, bool(guard.was_applied())) == (norm == math.inf, norm == 1.0)
    assert event.calls == "record "  # type: ignore[attr-defined]
    guard.settle()
    guard.settle()
    assert event.calls == "record synchronize "  # type: ignore[attr-defined]
    assert (engine.skipped_steps, scheduler.last_epoch) == ((0, 1) if norm == 1.0 else (1, 0))
    assert adam.param_groups[0]["lr"] == pytest.approx(0.2 if norm == 1.0 else 0.1)
