"""Numbers of sequences, micro-batches and steps of a run, derived from the config."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.config.schema import Config
from dsmoe.plan.text import quantity, readable_count
from dsmoe.plan.topology import Topology


@dataclass(frozen=True)
class Batch:
    """The sizes of one optimizer step over the whole cluster, and the number of steps."""

    topology: Topology
    micro_batch_size: int
    """Sequences per data rank per forward pass."""
    sequence_length: int
    """Tokens per sequence."""
    accumulation_steps: int
    """Forward passes of one rank per optimizer step."""
    steps: int
    """Optimizer steps of the run."""

    @classmethod
    def from_config(cls, config: Config) -> Batch:
        """Derive the sizes from `train`, `cluster` and `parallel` of a config that `load_config` has checked."""
        topology, train = Topology.from_config(config), config.train
        accumulation_steps, rest = divmod(
            train.batch_tokens, topology.data * train.micro_batch_size * train.sequence_length
        )
        assert rest == 0, "load_config refuses a batch that is not a whole number of micro-batches per data rank"
        steps = train.steps
        if steps is None:
            assert train.tokens is not None, "load_config refuses a run of no stated length"
            steps = train.tokens // train.batch_tokens
        return cls(
            topology=topology,
            micro_batch_size=train.micro_batch_size,
            sequence_length=train.sequence_length,
            accumulation_steps=accumulation_steps,
            steps=steps,
        )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all data ranks together in one optimizer step."""
        return self.topology.data * self.accumulation_steps

    @property
    def sequences_per_step(self) -> int:
        """Sequences of all data ranks together in one optimizer step."""
        return self.micro_batches_per_step * self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all data ranks together in one optimizer step: `train.batch_tokens`."""
        return self.sequences_per_step * self.sequence_length

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run: `train.tokens` rounded down to whole steps."""
        return self.steps * self.tokens_per_step

    def explain(self) -> str:
        """Write the arithmetic in one line: `2 devices x 8 sequences x 256 tokens x 1 accumulation step = ...`."""
        topology = self.topology
        readers = quantity(topology.world_size, "device")
        if topology.tensor > 1:  # the ranks of a tensor group read the same sequences
            readers = f"{quantity(topology.data, 'data rank')} ({readers} / tensor {topology.tensor})"
        factors = (
            readers,
            quantity(self.micro_batch_size, "sequence"),
            quantity(self.sequence_length, "token"),
            quantity(self.accumulation_steps, "accumulation step"),
        )
        return (
            f"{' x '.join(factors)} = {quantity(self.tokens_per_step, 'token')} per step; "
            f"{quantity(self.steps, 'step')} = {readable_count(self.total_tokens)} tokens"
        )


DEFAULT_EVAL_SEQUENCES = 128
EVAL_BATCH = 8
"""Sequences that `train.eval_batches`, the older name of the quantity, counts by."""


def eval_sequences(config: Config) -> int:
    """Held-out sequences of each source in an evaluation: the same whatever the devices and the micro-batch."""
    train = config.train
    if train.eval_sequences is not None:
        return train.eval_sequences
    return EVAL_BATCH * train.eval_batches if train.eval_batches is not None else DEFAULT_EVAL_SEQUENCES
