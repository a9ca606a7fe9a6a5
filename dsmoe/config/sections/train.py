"""The section `train`: length, batch, precision and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import (
    Interval,
    Length,
    MathEffect,
    NoEffect,
    NonNegativeInt,
    PositiveInt,
    Section,
    StepEffect,
)
from dsmoe.config.sections.parallel import world_size
from dsmoe.config.suggestions import nearest_multiples_of

if TYPE_CHECKING:
    from dsmoe.config.sections.cluster import Cluster
    from dsmoe.config.sections.model import Model
    from dsmoe.config.sections.parallel import Parallel


class Train(Section):
    """Length, batch, precision and evaluation."""

    steps: NoEffect[PositiveInt | None] = None
    """Optimizer steps; give `steps` or `tokens`, not both."""
    tokens: NoEffect[PositiveInt | None] = None
    """Training tokens; the last step is the last full batch of them."""
    batch_tokens: StepEffect[PositiveInt]
    """Tokens per optimizer step over the whole cluster."""
    micro_batch_size: NoEffect[Length] = 1
    """Sequences per device per forward pass."""
    sequence_length: StepEffect[Length]
    """Tokens in one training sequence."""
    precision: MathEffect[Literal["fp32", "bf16"]] = "bf16"
    """Arithmetic of the forward and backward pass; `bf16` keeps fp32 master weights in the optimizer."""
    recompute: NoEffect[Literal["none", "selective", "full"]] = "none"
    """Activations that are computed again in the backward pass instead of kept: `selective`, the first product of the
    experts, which is most of what an MoE layer keeps; `full`, each block from its input."""
    seed: MathEffect[NonNegativeInt] = 0
    """Decides the initial weights."""
    eval_every: NoEffect[Interval] = None
    """Steps between evaluations; null or 0 evaluates only before the first and after the last step."""
    eval_sequences: NoEffect[PositiveInt | None] = None
    """Held-out sequences per source in an evaluation: the same text however many devices there are and whatever the
    micro-batch; null means 128."""
    eval_batches: NoEffect[PositiveInt | None] = None
    """An older way to say `eval_sequences`: in eights, whatever the micro-batch."""


def length_problems(train: Train, model: Model) -> Iterator[Problem]:
    """Check the length of sequences and of the run."""
    if train.sequence_length > model.max_sequence_length:
        yield (
            "train.sequence_length",
            f"train.sequence_length ({train.sequence_length}) must be at most model.max_sequence_length "
            f"({model.max_sequence_length}); lower the one or raise the other",
        )
    if train.steps is None and train.tokens is None:
        yield "train", "train.steps or train.tokens must say how long to train; set one of them"
    if train.steps is not None and train.tokens is not None:
        yield (
            "train.tokens",
            f"train.steps ({train.steps}) and train.tokens ({train.tokens}) are both set; "
            "remove one, or set it to null if it is included",
        )
    if train.tokens is not None and train.tokens < train.batch_tokens:
        yield (
            "train.tokens",
            f"train.tokens ({train.tokens}) must be at least train.batch_tokens ({train.batch_tokens}), one step",
        )


def evaluation_problems(train: Train) -> Iterator[Problem]:
    """Check that the size of an evaluation is set by one key only."""
    if train.eval_sequences is not None and train.eval_batches is not None:
        yield (
            "train.eval_batches",
            f"train.eval_sequences ({train.eval_sequences}) and train.eval_batches ({train.eval_batches}, in eights) "
            "both say how much is evaluated; remove eval_batches, or set it to null if it is included",
        )


def batch_problems(train: Train, cluster: Cluster, parallel: Parallel) -> Iterator[Problem]:
    """Check that a step consists of whole micro-batches on every data rank."""
    data_degree, rest = divmod(world_size(cluster), parallel.tensor)
    unit = train.micro_batch_size * train.sequence_length
    if rest:  # the data degree is undefined, which another rule reports
        if train.batch_tokens % unit:
            yield (
                "train.batch_tokens",
                f"train.batch_tokens ({train.batch_tokens}) must be a multiple of train.micro_batch_size * "
                f"train.sequence_length ({train.micro_batch_size} * {train.sequence_length} = {unit}), whatever the "
                f"number of data ranks becomes; nearest: {nearest_multiples_of(train.batch_tokens, unit)}",
            )
        return
    unit *= data_degree
    if train.batch_tokens % unit:
        yield (
            "train.batch_tokens",
            f"train.batch_tokens ({train.batch_tokens}) must be a multiple of data ranks * train.micro_batch_size * "
            f"train.sequence_length ({data_degree} * {train.micro_batch_size} * {train.sequence_length} = {unit}); "
            f"nearest: {nearest_multiples_of(train.batch_tokens, unit)}",
        )
