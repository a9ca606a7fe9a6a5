"""The section `optimizer`: AdamW and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dsmoe.config.errors import Problem
from dsmoe.config.schedules import default_decay_steps, schedule_named, with_decay_steps
from dsmoe.config.sections.base import (
    Beta,
    MathEffect,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

if TYPE_CHECKING:
    from dsmoe.config.sections.parallel import Parallel
    from dsmoe.config.sections.train import Train


class Optimizer(Section):
    """AdamW with decoupled weight decay on matrices only, and the learning-rate schedule."""

    lr: NoEffect[PositiveFloat]
    """The highest learning rate, reached after the warm-up."""
    min_lr: NoEffect[NonNegativeFloat] = 0.0
    """The learning rate at the end of the decay."""
    betas: MathEffect[Annotated[tuple[Beta, Beta], Field(strict=False)]] = (0.9, 0.95)
    """Decay of Adam's running mean of the gradient and of its square."""
    eps: MathEffect[PositiveFloat] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: MathEffect[NonNegativeFloat] = 0.1
    """Part of a weight removed per step, times the learning rate."""
    grad_clip: NoEffect[NonNegativeFloat] = 1.0
    """Largest global gradient norm over all parameters, experts included; 0 does not clip."""
    schedule: MathEffect[Literal["cosine", "wsd", "linear", "constant"]] = "cosine"
    """Course of the learning rate after the warm-up; `wsd` stays high and decays at the end."""
    warmup_steps: NoEffect[NonNegativeInt] = 0
    """Steps in which the learning rate rises linearly from 0."""
    offload: NoEffect[bool] = False
    """Keep the fp32 weights and moments in the host's memory, and step there: less device memory, slower steps. Needs
    `parallel.zero_stage` 1 or 2."""
    decay_steps: MathEffect[PositiveInt | None] = None
    """`wsd` only: length of the final decay; null means a fifth of the steps."""


def learning_rate_problems(optimizer: Optimizer) -> Iterator[Problem]:
    """Check that the keys of the schedule fit each other."""
    if optimizer.min_lr > optimizer.lr:
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({optimizer.min_lr:g}) must be at most optimizer.lr ({optimizer.lr:g})",
        )
    if optimizer.decay_steps is not None and not schedule_named(optimizer.schedule).takes_decay_steps:
        yield (
            "optimizer.decay_steps",
            f"optimizer.decay_steps ({optimizer.decay_steps}) would be unused: optimizer.schedule is "
            f"{optimizer.schedule}; remove it or set optimizer.schedule: {' or '.join(with_decay_steps())}",
        )


def offload_problems(optimizer: Optimizer, parallel: Parallel) -> Iterator[Problem]:
    """Check that DeepSpeed can keep the optimizer on the host."""
    if optimizer.offload and parallel.zero_stage == 0:
        yield (
            "optimizer.offload",
            "optimizer.offload (true) needs parallel.zero_stage (0) to be 1 or 2, at which DeepSpeed can keep the "
            "optimizer on the host",
        )


def schedule_problems(optimizer: Optimizer, train: Train) -> Iterator[Problem]:
    """Check that warm-up and decay fit into the run, if its number of steps is known."""
    if (train.steps is None) == (train.tokens is None):
        return
    steps = train.steps or (train.tokens or 0) // train.batch_tokens
    if steps == 0:
        return
    total = f"{steps}, from train.steps" if train.steps else f"{steps} = train.tokens // train.batch_tokens"
    warmup = optimizer.warmup_steps
    if warmup >= steps:
        yield (
            "optimizer.warmup_steps",
            f"optimizer.warmup_steps ({warmup}) must be less than the number of steps ({total})",
        )
    elif schedule_named(optimizer.schedule).takes_decay_steps:
        decay = optimizer.decay_steps or default_decay_steps(steps)
        origin = "" if optimizer.decay_steps else ", a fifth of the steps"
        if warmup + decay > steps:
            yield (
                "optimizer.decay_steps" if optimizer.decay_steps else "optimizer.warmup_steps",
                f"optimizer.warmup_steps ({warmup}) + optimizer.decay_steps ({decay}{origin}) must be at most the "
                f"number of steps ({total}); with this warm-up, decay_steps can be up to {steps - warmup}",
            )
