"""The `moe/...` metrics, from the global sums of every MoE layer's statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe.moe.stats import LayerStatistics


@dataclass(frozen=True)
class LayerMetrics:
    """One layer's figures over one step and all ranks."""

    balance_loss: float
    z_loss: float
    router_logit_rms: float
    load_max_over_mean: float
    load_cv: float
    dead_expert_percent: float
    routing_entropy_normalized: float
    dropped_percent: float
    dropped_weight_percent: float
    capacity_used_percent: float

    @classmethod
    def of(cls, layer: LayerStatistics) -> LayerMetrics:
        """Work the figures out.

        Loads are assignments before dropping. The coefficient of variation is the population's standard deviation
        over the mean. An expert is dead if no token of the step chose it. The entropy is that of the mean score,
        over log E: 1 when the router uses all experts alike. `router_logit_rms` is the root of the mean squared logit
        over tokens and experts: where it grows without end, the router saturates and a z-loss helps.
        """
        loads = layer.assigned_E.double()
        mean = loads.mean().clamp(min=1e-9)
        share = layer.score_E / layer.score_E.sum().clamp(min=1e-9)
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        assigned, kept = float(loads.sum()), float(layer.kept_E.sum())
        return cls(
            balance_loss=layer.balance_loss / max(layer.micro_batches, 1),
            z_loss=layer.z_loss / max(layer.micro_batches, 1),
            router_logit_rms=math.sqrt(layer.square_logit / max(layer.tokens, 1)),
            load_max_over_mean=float(loads.max() / mean),
            load_cv=float(loads.std(correction=0) / mean),
            dead_expert_percent=float((loads == 0).double().mean()) * 100,
            routing_entropy_normalized=float(entropy) / math.log(len(loads)),
            dropped_percent=(assigned - kept) / max(assigned, 1) * 100,
            dropped_weight_percent=layer.dropped_weight / max(layer.weight, 1e-9) * 100,
            capacity_used_percent=kept / max(layer.slots, 1) * 100,
        )


def routing_metrics(layers: Sequence[LayerStatistics]) -> dict[str, float]:
    """The metrics over all MoE layers; loads give the worst layer and, under `/mean`, the mean of the layers."""
    each = [LayerMetrics.of(layer) for layer in layers]

    def mean(name: str) -> float:
        return sum(getattr(metrics, name) for metrics in each) / len(each)

    means = ("balance_loss", "z_loss", "router_logit_rms", "routing_entropy_normalized")
    result = {f"moe/{name}": mean(name) for name in means}
    for name in ("load_max_over_mean", "load_cv", "dead_expert_percent"):
        result[f"moe/{name}"] = max(getattr(metrics, name) for metrics in each)
        result[f"moe/{name}/mean"] = mean(name)
    # Shares of the whole: sums over layers before the division.
    assigned, kept = (sum(float(getattr(layer, n).sum()) for layer in layers) for n in ("assigned_E", "kept_E"))
    weight, dropped_weight, slots = (
        sum(getattr(layer, n) for layer in layers) for n in ("weight", "dropped_weight", "slots")
    )
    result["moe/dropped_percent"] = (assigned - kept) / max(assigned, 1) * 100
    result["moe/dropped_weight_percent"] = dropped_weight / max(weight, 1e-9) * 100
    result["moe/capacity_used_percent"] = kept / max(slots, 1) * 100
    return result


def layer_metrics(index: int, layer: LayerStatistics) -> dict[str, float]:
    """The same of one layer, as `moe/layer_003/...` (three digits, so that charts sort them)."""
    metrics = LayerMetrics.of(layer)
    return {f"moe/layer_{index:03d}/{name}": getattr(metrics, name) for name in metrics.__dataclass_fields__}
