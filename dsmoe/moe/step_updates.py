"""Updates of MoE layers between the passes: once per optimizer step, and once per log step.

A training loop of your own calls `begin_step` before a step's first micro-batch, `update_routers` after its last, and
`hold_drop_rate` when it knows the drop rate, as `dsmoe.train.Trainer` does.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dsmoe.moe.layer import MoE


def begin_step(layers: Sequence[MoE], step: int) -> None:
    """Begin optimizer step `step`: random draws follow its number, and counts start from zero."""
    for layer in layers:
        layer.begin_step(step)


def update_routers(layers: Sequence[MoE], applied: bool | torch.Tensor = True) -> None:
    """Update selection biases and global load shares by the step's counts; collective.

    The counts are those of `layer.statistics` since `begin_step`: once per assignment, also under recompute. One
    all-reduce over all ranks serves all layers, and the host reads nothing. Without layers that need counts nothing is
    done.

    Args:
        layers: the model's MoE layers.
        applied: True if the optimizer has applied the step (`engine.update_guard.was_applied()`), the same on all
            ranks; bool, on the host or the device. False leaves everything as it is.
    """
    waiting = [layer for layer in layers if layer.balance.needs_counts]
    on_device = applied if isinstance(applied, torch.Tensor) else None
    if not waiting or (on_device is None and not applied):
        return
    counts = torch.cat([layer.statistics.assigned for layer in waiting])
    if dist.is_initialized():
        dist.all_reduce(counts)
    for layer, counts_E in zip(waiting, counts.split([layer.num_experts for layer in waiting]), strict=True):
        layer.balance.update(counts_E, on_device)


def hold_drop_rate(layers: Sequence[MoE], dropped_percent: float) -> None:
    """Move the capacity factor of layers that hold a drop rate; `dropped_percent` is that of all ranks."""
    for layer in layers:
        if layer.limit.controller is not None:
            layer.limit.controller.update(dropped_percent)


def capacity_factor(layers: Sequence[MoE]) -> float | None:
    """Return the factor that `hold_drop_rate` moves, the highest of the layers; None if it moves none."""
    controllers = [layer.limit.controller for layer in layers]
    return max((controller.factor for controller in controllers if controller is not None), default=None)
