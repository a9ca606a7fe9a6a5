"""The `moe/...` metrics, computed from the global sums of every MoE layer's statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsmoe.metrics.definitions import (
    MOE_BALANCE_LOSS,
    MOE_CAPACITY_USED_PERCENT,
    MOE_DEAD_EXPERT_PERCENT,
    MOE_DROPPED_PERCENT,
    MOE_DROPPED_WEIGHT_PERCENT,
    MOE_LOAD_CV,
    MOE_LOAD_MAX_OVER_MEAN,
    MOE_ROUTER_LOGIT_RMS,
    MOE_ROUTING_ENTROPY_NORMALIZED,
    MOE_Z_LOSS,
)
from dsmoe.metrics.metric import Combine, Metric
from dsmoe.moe.stats import LayerStatistics


@dataclass(frozen=True)
class Share:
    """A percentage whose numerator and denominator are summed over the layers before the division."""

    part: float
    whole: float

    @property
    def percent(self) -> float:
        """0 where the whole is 0."""
        return self.part / max(self.whole, 1e-9) * 100


def layer_values(layer: LayerStatistics) -> dict[Metric, float | Share]:
    """Return one layer's value of every metric with `in_every_layer`; a `Share` for those reduced as sum/sum.

    Args:
        layer: sums over the micro-batches of a step and over all ranks.
    """
    loads_E = layer.assigned_E.double()
    mean = loads_E.mean().clamp(min=1e-9)
    share_E = layer.score_E / layer.score_E.sum().clamp(min=1e-9)
    entropy = -(share_E * share_E.clamp(min=1e-30).log()).sum()
    assigned, kept = float(loads_E.sum()), float(layer.kept_E.sum())
    return {
        MOE_BALANCE_LOSS: layer.balance_loss / max(layer.micro_batches, 1),
        MOE_Z_LOSS: layer.z_loss / max(layer.micro_batches, 1),
        MOE_ROUTER_LOGIT_RMS: math.sqrt(layer.square_logit / max(layer.tokens, 1)),
        MOE_ROUTING_ENTROPY_NORMALIZED: float(entropy) / math.log(len(loads_E)),
        MOE_LOAD_MAX_OVER_MEAN: float(loads_E.max() / mean),
        MOE_LOAD_CV: float(loads_E.std(correction=0) / mean),
        MOE_DEAD_EXPERT_PERCENT: float((loads_E == 0).double().mean()) * 100,
        MOE_DROPPED_PERCENT: Share(assigned - kept, assigned),
        MOE_DROPPED_WEIGHT_PERCENT: Share(layer.dropped_weight, layer.weight),
        MOE_CAPACITY_USED_PERCENT: Share(kept, layer.slots),
    }


def routing_metrics(layers: Sequence[LayerStatistics]) -> dict[str, float]:
    """Return the metrics over all MoE layers by name, each reduced over the layers as its definition says."""
    values = [layer_values(layer) for layer in layers]
    metrics: dict[str, float] = {}
    for metric in values[0]:
        over_layers = [of_layer[metric] for of_layer in values]
        metrics[metric.name] = _reduced(metric, over_layers)
        if metric.layer_mean:
            metrics[metric.layer_mean] = _mean([_number(value) for value in over_layers])
    return metrics


def layer_metrics(index: int, layer: LayerStatistics) -> dict[str, float]:
    """Return the metrics of the MoE layer in block `index` by name: `moe/layer_003/...`."""
    return {metric.in_layer(index): _number(value) for metric, value in layer_values(layer).items()}


def _reduced(metric: Metric, values: Sequence[float | Share]) -> float:
    """Reduce the layers' values of a metric to one.

    Raises:
        TypeError: a metric that is reduced as sum/sum has no `Share`, or another has one.
    """
    how = metric.reduction.layers
    shares = [value for value in values if isinstance(value, Share)]
    if len(shares) != (len(values) if how is Combine.RATIO else 0):
        raise TypeError(f"{metric.name}: a Share is for metrics that are reduced over layers as {Combine.RATIO.value}")
    if how is Combine.RATIO:
        return Share(sum(share.part for share in shares), sum(share.whole for share in shares)).percent
    assert how is not None, f"{metric.name} has a value in every layer, and no reduction over layers"
    return _OVER_LAYERS[how]([_number(value) for value in values])


def _number(value: float | Share) -> float:
    return value.percent if isinstance(value, Share) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_OVER_LAYERS: dict[Combine, Callable[[Sequence[float]], float]] = {
    Combine.SUM: sum,
    Combine.MEAN: _mean,
    Combine.MAX: max,
    Combine.MIN: min,
}
