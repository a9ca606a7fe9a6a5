"""Train a few steps and say how far that is from the same training on another layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsmoe.checkpoint.placement import sharded_tensors
from dsmoe.checkpoint.state import Chunk
from dsmoe.metrics.definitions import EVAL_LOSS, TRAIN_LOSS
from dsmoe.parallel import Groups
from dsmoe.parallel.sharding import ShardedTensor
from dsmoe.plan import Plan
from dsmoe.runtime.processes import Rank
from dsmoe.train.initialize import prepare_data
from dsmoe.train.trainer import make_trainer


@dataclass(frozen=True)
class Training:
    """The results of a few steps on one rank."""

    losses: list[float]
    """The global loss of each step."""
    norms: list[float]
    """The global gradient norm of each step, before clipping."""
    held_out: float
    """The held-out loss after the last step."""
    weights: Mapping[str, torch.Tensor]
    """The whole model's weights after it, fp32 on the host; on the first rank only."""
    apart: float
    """The largest difference between two ranks' copies of one weight; on the first rank only."""
    travelled: float
    """Learning rate times steps: the farthest that Adam takes a weight."""


@dataclass(frozen=True)
class Difference:
    """The largest differences between two trainings; the first three relative, `weights` in parts of the way travelled.

    `worst_weight` names the weight, `apart` is `Training.apart` in the same parts.
    """

    losses: float
    norms: float
    held_out: float
    weights: float
    worst_weight: str
    apart: float

    def beyond(self, tolerance: Tolerance) -> list[str]:
        """Name the differences beyond the tolerance."""
        limits = {
            "loss": (self.losses, tolerance.losses),
            "gradient norm": (self.norms, tolerance.norms),
            "held-out loss": (self.held_out, tolerance.losses),
            f"weight {self.worst_weight}": (self.weights, tolerance.weights),
            "ranks' copies of a weight": (self.apart, tolerance.weights),
        }
        return [what for what, (value, limit) in limits.items() if not value <= limit]  # NaN is beyond


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that rounding explains, in the units of `Difference`."""

    losses: float
    norms: float
    weights: float


TOLERANCES = {
    "fp32": Tolerance(losses=1e-5, norms=1e-5, weights=1e-3),
    # bf16 rounds every sum that a layout makes in another order by up to 2^-9. Adam divides a gradient by its own size,
    # so that the rounding of one near zero is a step of full size: single weights say nothing.
    "bf16": Tolerance(losses=1e-3, norms=4e-3, weights=float("inf")),
}


def train_few_steps(plan: Plan, rank: Rank, steps: int) -> Training:
    """Train a fresh model by `plan` in a world that has been joined; collective."""
    config = plan.config
    folder = Path(config.runs_dir) / "checkpoints"
    trainer = make_trainer(plan, Groups(plan.topology), rank, folder, prepare_data(config))
    losses, norms = [], []
    for _ in range(steps):
        norms.append(float(trainer.step()))
        losses.append(trainer.meter.read(layer_detail=False)[TRAIN_LOSS.name])
    held_out = trainer.evaluate()[EVAL_LOSS.name]
    weights, apart = whole_weights(trainer.model)
    return Training(losses, norms, held_out, weights, apart, config.optimizer.lr * steps)


def difference(trainings: Sequence[Training], reference: Training) -> Difference:
    """Compare all ranks' `trainings`, the first rank's first, with `reference`, a first rank's.

    Raises:
        ValueError: they are not of the same weights.
    """
    first = trainings[0]
    if unequal := first.weights.keys() ^ reference.weights.keys():
        raise ValueError(f"only one of the two models has {', '.join(sorted(unequal))}")
    off = {name: _largest(weight - reference.weights[name]) for name, weight in first.weights.items()}
    worst = max(off, key=lambda name: off[name])
    return Difference(
        max(_relative(training.losses, reference.losses) for training in trainings),
        max(_relative(training.norms, reference.norms) for training in trainings),
        max(_relative([training.held_out], [reference.held_out]) for training in trainings),
        off[worst] / first.travelled,
        worst,
        first.apart / first.travelled,
    )


def whole_weights(model: nn.Module) -> tuple[dict[str, torch.Tensor], float]:
    """Every weight of the whole model, fp32 on the first rank's host, and the most that two ranks' copies differ by.

    So are the buffers that are saved with the model. Collective; the other ranks get nothing. One weight at a time is
    in flight.
    """
    wholes: dict[str, torch.Tensor] = {}
    apart = 0.0
    for chunks in _gathered(model):
        for chunk in chunks:
            whole = wholes.setdefault(chunk.key, torch.full(chunk.shape, float("nan")))
            gathered = chunk.box.view(whole)
            if gathered.isnan().all():
                gathered.copy_(chunk.values)
            else:
                apart = max(apart, _largest(gathered - chunk.values))
    return wholes, apart


def _gathered(model: nn.Module) -> Iterator[list[Chunk]]:
    """Yield for each parameter and saved buffer all ranks' chunks, on the first rank; empty lists on the others."""
    is_first = dist.get_rank() == 0
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    replicated = {name: ShardedTensor.replicated(name, buffer) for name, buffer in buffers.items()}
    sharded_by_name = {**replicated, **sharded_tensors(model)}
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        sharded, value = sharded_by_name[name], tensor.detach().float().cpu()
        chunks = [
            Chunk(sharded.name, sharded.shape, global_box, local_box.view(value).clone())
            for local_box, global_box in sharded.boxes
        ]
        gathered: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(chunks, gathered)
        yield [chunk for rank_chunks in gathered or [] for chunk in rank_chunks]


def _relative(values: Sequence[float], reference: Sequence[float]) -> float:
    return max(_or_infinite(abs(a - b) / abs(b)) for a, b in zip(values, reference, strict=True))


def _largest(differences: torch.Tensor) -> float:
    return _or_infinite(float(differences.abs().max()))


def _or_infinite(value: float) -> float:
    """Infinity for NaN, which `max` would pass over."""
    return float("inf") if value != value else value
