"""The arithmetic of a step, and its sentence."""

from __future__ import annotations

from typing import Any

from dsmoe.plan import Batch
from tests.helpers.plan_configs import make_config


def batch_of(nodes: int = 1, devices_per_node: int = 2, tensor: int = 1, **train: Any) -> Batch:
    return Batch.from_config(
        make_config(
            cluster={"nodes": nodes, "devices_per_node": devices_per_node}, parallel={"tensor": tensor}, train=train
        )
    )


def test_one_accumulation_step() -> None:
    batch = batch_of(micro_batch_size=8, sequence_length=256, batch_tokens=4096, steps=300)
    assert (batch.accumulation_steps, batch.micro_batches_per_step, batch.sequences_per_step) == (1, 2, 16)
    assert (batch.tokens_per_step, batch.steps, batch.total_tokens) == (4096, 300, 1_228_800)
    assert batch.explain() == (
        "2 devices x 8 sequences x 256 tokens x 1 accumulation step = 4,096 tokens per step; 300 steps = 1.2 M tokens"
    )


def test_accumulation_and_tensor_ranks_that_read_the_same_data() -> None:
    batch = batch_of(
        nodes=8, devices_per_node=8, tensor=2, micro_batch_size=1, sequence_length=4096, batch_tokens=2**22, steps=1
    )
    assert (batch.accumulation_steps, batch.micro_batches_per_step, batch.sequences_per_step) == (32, 1024, 1024)
    assert batch.explain() == (
        "32 data ranks (64 devices / tensor 2) x 1 sequence x 4,096 tokens x 32 accumulation steps = "
        "4,194,304 tokens per step; 1 step = 4.2 M tokens"
    )


def test_tokens_are_rounded_down_to_whole_steps() -> None:
    batch = batch_of(batch_tokens=4096, sequence_length=256, steps=None, tokens=10_000)
    assert (batch.steps, batch.total_tokens) == (2, 8192)
