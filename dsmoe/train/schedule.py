"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from dsmoe.config.schema import Optimizer


def learning_rate(optimizer: Optimizer, steps: int, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of a run of `steps`.

    It rises linearly over `warmup_steps`, reaching `lr` at the last of them, and then

    * `constant`: stays;
    * `linear`: falls linearly, reaching `min_lr` at the last step;
    * `cosine`: falls along half a cosine, reaching `min_lr` at the last step (Loshchilov & Hutter 2017);
    * `wsd`: stays, and falls linearly to `min_lr` over the last `decay_steps` (MiniCPM, arXiv 2404.06395).
    """
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return peak
    decay = default_decay_steps(optimizer, steps) if optimizer.schedule == "wsd" else steps - warmup
    # The last step, steps - 1, is at 1: the floor is reached, not only approached.
    progress = min(max((step + 1 - (steps - decay)) / max(decay, 1), 0.0), 1.0)
    if optimizer.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress


def default_decay_steps(optimizer: Optimizer, steps: int) -> int:
    """The length of `wsd`'s final decay: as given, or a fifth of the steps."""
    return optimizer.decay_steps or max(1, steps // 5)
