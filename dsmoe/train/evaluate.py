"""Held-out loss: every rank takes part, nothing is random, nothing depends on the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dsmoe.data import PreparedSource, ValidationLoader, bigram_nats
from dsmoe.metrics.definitions import EVAL_BITS_PER_BYTE, EVAL_LOSS, EVAL_SOURCE_BITS_PER_BYTE, EVAL_SOURCE_LOSS
from dsmoe.runtime.progress import Job
from dsmoe.runtime.watchdog import record_position
from dsmoe.train.phases import Phase


@dataclass(frozen=True)
class HeldOut:
    """One source's held-out text and this rank's part of it."""

    source: PreparedSource
    loader: ValidationLoader


def text_of(held_out: Sequence[HeldOut], sequence_length: int) -> dict[str, str]:
    """Describe the text that an evaluation reads of each source: losses compare where this is the same."""
    return {
        part.source.name: f"{part.loader.num_sequences} sequences of {sequence_length} tokens, of text "
        f"{part.source.token_checksums.partition('/')[2][:12]}"
        for part in held_out
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: Sequence[HeldOut], device: torch.device, what: str = "evaluating"
) -> dict[str, float]:
    """Mean loss and bits per byte of each source and of all together; collective over all ranks.

    `eval/loss` is the summed cross entropy in nats over the number of tokens; bits per byte are the same sum in bits
    over the bytes of text that those tokens stand for, so that tokenizers can be compared. If it takes a minute, the
    log says so, and calls it `what`.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(held_out), 2, dtype=torch.float64, device=device)
    with Job("evaluation", what) as job:
        job.expect(sum(len(part.loader) for part in held_out), "batches")
        for row, part in zip(sums, held_out, strict=True):
            job.at(part.source.name)
            for tokens, weight in part.loader:
                # A dense model has nothing else to note, and the watch ends what stands still.
                record_position(Phase.EVALUATION.value)
                losses_BS = model(tokens.to(device))
                row[0] += (losses_BS.double().sum(dim=1) * weight.to(device)).sum()
                row[1] += weight.to(device).sum() * losses_BS.shape[1]
                job.add(1)
        model.train(was_training)
        job.waits("all evaluated")
        dist.all_reduce(sums)
    return _metrics([part.source for part in held_out], sums.tolist())


def evaluate_bigram_model(held_out: Sequence[HeldOut], vocab_size: int) -> dict[str, float]:
    """The same metrics of a bigram model of each source's tokens, on the very same sequences; no rank needs another."""
    sums = []
    for part in held_out:
        sequences = part.loader.sequences()
        nats = bigram_nats(part.source, vocab_size, sequences)
        sums.append([nats, float(sequences[:, 1:].size)])
    return _metrics([part.source for part in held_out], sums)


def _metrics(sources: Sequence[PreparedSource], sums: list[list[float]]) -> dict[str, float]:
    """Name the figures of each source's (nats, tokens)."""
    metrics: dict[str, float] = {}
    total_nats = total_tokens = total_bytes = 0.0
    for source, (nats, tokens) in zip(sources, sums, strict=True):
        num_bytes = tokens * source.validation_bytes_per_token
        metrics[EVAL_SOURCE_LOSS.name_for(source.name)] = nats / tokens
        metrics[EVAL_SOURCE_BITS_PER_BYTE.name_for(source.name)] = nats / math.log(2) / num_bytes
        total_nats, total_tokens, total_bytes = total_nats + nats, total_tokens + tokens, total_bytes + num_bytes
    metrics[EVAL_LOSS.name] = total_nats / total_tokens
    metrics[EVAL_BITS_PER_BYTE.name] = total_nats / math.log(2) / total_bytes
    return metrics
