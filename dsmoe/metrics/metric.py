"""The type of a metric's definition: name, unit, meaning, reduction, and the lines of `metrics.jsonl` that have it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Combine(Enum):
    """A way to make one number of the numbers of several steps, micro-batches, ranks or layers."""

    SUM = "sum"
    RATIO = "sum/sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True)
class Reduction:
    """The reduction of a metric over each axis; None where every part has the same number, or there is one part."""

    steps: Combine | None = None
    """Over the optimizer steps since the line before."""
    micro_batches: Combine | None = None
    """Over the micro-batches of the logged step, or of the evaluation."""
    ranks: Combine | None = None
    layers: Combine | None = None
    """Over the MoE layers."""


class When(Enum):
    """The lines of `metrics.jsonl` that have a metric."""

    TRAINING = "all training lines"
    PEAK_KNOWN = "training lines where the device's peak is known (`cluster.device`)"
    SAVED = "the first training line after a checkpoint"
    MOE = "training lines of models with MoE layers"
    DROP_RATE_HELD = "training lines with `moe.capacity.target_drop_percent`"
    EVALUATION = "all evaluation lines"


@dataclass(frozen=True)
class Metric:
    """The definition of one metric, or of a family whose names differ in a variable part, such as `<source>`."""

    name: str
    """Key in `metrics.jsonl` and TensorBoard: `group/rest`, with at most one variable part in angle brackets."""
    unit: str
    """Empty for a pure number."""
    meaning: str
    """One sentence, in Markdown, without a full stop."""
    when: When
    reduction: Reduction = Reduction()
    source: str = ""
    """Paper or convention of the formula, in Markdown."""
    in_every_layer: bool = False
    """True where each MoE layer's own value is written as well, see `in_layer`."""

    @property
    def group(self) -> str:
        """The part of the name before the first slash."""
        return self.name.partition("/")[0]

    @property
    def layer_mean(self) -> str | None:
        """The name of the mean over the layers, which accompanies the worst layer's value; None for other metrics."""
        is_of_worst_layer = self.in_every_layer and self.reduction.layers in (Combine.MAX, Combine.MIN)
        return f"{self.name}/mean" if is_of_worst_layer else None

    def in_layer(self, layer: int | str) -> str:
        """Return the name of one layer's value: `moe/load_cv` in layer 3 is `moe/layer_003/load_cv`, which sorts."""
        number = layer if isinstance(layer, str) else f"{layer:03d}"
        return f"{self.group}/layer_{number}/{self.name.partition('/')[2]}"

    @property
    def names(self) -> tuple[str, ...]:
        """All names, or patterns of names, under which the metric is written."""
        layers = (self.in_layer("<layer>"),) if self.in_every_layer else ()
        return (self.name, *([self.layer_mean] if self.layer_mean else []), *layers)

    def name_for(self, value: str) -> str:
        """Return the name with `value` in place of its variable part."""
        return re.sub("<[a-z_]+>", lambda _: value, self.name)

    def variable_part(self, key: str) -> str | None:
        """Return the variable part of a key, the inverse of `name_for`; None where the key is another metric's."""
        found = pattern(self.name).fullmatch(key)
        return found.group(1) if found and found.groups() else None


def pattern(name: str) -> re.Pattern[str]:
    """Return the expression that matches the keys of a name with variable parts, each as a group."""
    return re.compile(re.sub("<[a-z_]+>", "(.+)", name), re.DOTALL)
