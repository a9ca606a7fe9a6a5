"""The section `observe`: metrics while training."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import Interval, NoEffect, PositiveInt, Section
from dsmoe.config.suggestions import nearest_multiples_of


class Observe(Section):
    """Intervals and destinations of the metrics while training."""

    log_every: NoEffect[PositiveInt] = 1
    """Steps between lines on the console and in `metrics.jsonl`."""
    layer_detail_every: NoEffect[Interval] = None
    """Steps between per-layer metrics (`moe/layer_003/...`), a multiple of `log_every`; null or 0 never."""
    tensorboard: NoEffect[bool] = True
    """Write the metrics as TensorBoard events as well."""


def interval_problems(observe: Observe) -> Iterator[Problem]:
    """Check that per-layer metrics fall on log steps."""
    detail, every = observe.layer_detail_every, observe.log_every
    if detail is not None and detail % every:
        yield (
            "observe.layer_detail_every",
            f"observe.layer_detail_every ({detail}) must be a multiple of observe.log_every ({every}); "
            f"nearest: {nearest_multiples_of(detail, every)}",
        )
