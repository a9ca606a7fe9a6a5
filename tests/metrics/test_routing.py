"""The `moe/...` metrics against figures worked out on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsmoe.metrics import routing
from dsmoe.metrics.definitions import METRICS, MOE_DROPPED_PERCENT, MOE_LOAD_CV
from dsmoe.metrics.metric import Metric
from dsmoe.metrics.routing import Share, layer_metrics, layer_values, routing_metrics
from dsmoe.moe import LayerStatistics


def layer_sums(assigned: list[int], **changed: Any) -> LayerStatistics:
    """10 tokens of top-2 in 2 micro-batches; nothing dropped unless `changed` says so."""
    load = torch.tensor(assigned, dtype=torch.float64)
    values: dict[str, Any] = {
        "assigned_E": load,
        "kept_E": load,
        "score_E": load / 2,
        "weight": 10.0,
        "dropped_weight": 0.0,
        "balance_loss": 2.4,
        "z_loss": 0.5,
        "square_logit": 90.0,
        "tokens": 10.0,
        "micro_batches": 2.0,
        "slots": 20.0,
    }
    return LayerStatistics(**{**values, **changed})


def test_loads() -> None:
    """Loads 2, 4, 14, 0: mean 5, deviations -3, -1, 9, -5, variance 116 / 4 = 29."""
    metrics = routing_metrics([layer_sums([2, 4, 14, 0])])
    assert metrics["moe/load_max_over_mean"] == pytest.approx(14 / 5)
    assert metrics["moe/load_cv"] == pytest.approx(math.sqrt(29) / 5)
    assert metrics["moe/dead_expert_percent"] == 25.0


def test_even_loads_are_the_best_that_there_is() -> None:
    metrics = routing_metrics([layer_sums([5, 5, 5, 5])])
    assert metrics["moe/load_max_over_mean"] == 1.0
    assert metrics["moe/load_cv"] == 0.0
    assert metrics["moe/dead_expert_percent"] == 0.0
    assert metrics["moe/routing_entropy_normalized"] == pytest.approx(1.0)


def test_entropy_is_that_of_the_mean_score() -> None:
    """Mean scores 1/2, 1/4, 1/4, 0 over ten tokens: 1.5 bits of 2."""
    metrics = routing_metrics([layer_sums([5, 5, 5, 5], score_E=torch.tensor([5, 2.5, 2.5, 0]).double())])
    assert metrics["moe/routing_entropy_normalized"] == pytest.approx(1.5 / 2)


def test_entropy_is_zero_when_one_expert_gets_all() -> None:
    metrics = routing_metrics([layer_sums([20, 0], score_E=torch.tensor([10, 0]).double())])
    assert metrics["moe/routing_entropy_normalized"] == pytest.approx(0.0, abs=1e-12)


def test_losses_are_means_over_micro_batches_and_layers() -> None:
    other = layer_sums([5, 5, 5, 5], balance_loss=2.0, z_loss=0.1)
    metrics = routing_metrics([layer_sums([5, 5, 5, 5]), other])
    assert metrics["moe/balance_loss"] == pytest.approx((2.4 / 2 + 2.0 / 2) / 2)
    assert metrics["moe/z_loss"] == pytest.approx((0.5 / 2 + 0.1 / 2) / 2)


def test_logit_rms_is_the_root_of_the_mean_square() -> None:
    """10 tokens with a mean squared logit of 9, and a layer with one of 1."""
    metrics = routing_metrics([layer_sums([5, 5, 5, 5]), layer_sums([5, 5, 5, 5], square_logit=10.0)])
    assert metrics["moe/router_logit_rms"] == pytest.approx((3 + 1) / 2)


def test_drops_are_shares_of_all_layers_together() -> None:
    kept = torch.tensor([5, 5, 5, 0]).double()
    first = layer_sums([5, 5, 5, 5], kept_E=kept, weight=10.0, dropped_weight=1.0, slots=24.0)
    second = layer_sums([25, 25, 25, 25], weight=50.0, slots=100.0)
    metrics = routing_metrics([first, second])
    assert metrics["moe/dropped_percent"] == pytest.approx(100 * 5 / 120)
    assert metrics["moe/dropped_weight_percent"] == pytest.approx(100 * 1 / 60)
    assert metrics["moe/capacity_used_percent"] == pytest.approx(100 * 115 / 124)


def test_loads_name_the_worst_layer_and_the_mean() -> None:
    metrics = routing_metrics([layer_sums([5, 5, 5, 5]), layer_sums([0, 0, 20, 0])])
    assert (metrics["moe/load_max_over_mean"], metrics["moe/load_max_over_mean/mean"]) == (4.0, 2.5)
    assert (metrics["moe/dead_expert_percent"], metrics["moe/dead_expert_percent/mean"]) == (75.0, 37.5)
    assert metrics["moe/load_cv"] == pytest.approx(math.sqrt(75) / 5)
    assert metrics["moe/load_cv/mean"] == pytest.approx(math.sqrt(75) / 10)


def test_one_layer_has_the_same_figures_under_a_name_that_sorts() -> None:
    layer = layer_sums([2, 4, 14, 0], kept_E=torch.tensor([2, 4, 8, 0]).double(), dropped_weight=3.0)
    detail = layer_metrics(7, layer)
    whole = routing_metrics([layer])
    assert detail == {
        name.replace("moe/", "moe/layer_007/"): value for name, value in whole.items() if not name.endswith("/mean")
    }
    assert detail["moe/layer_007/dropped_percent"] == pytest.approx(30.0)


def test_a_step_without_tokens_divides_by_nothing() -> None:
    empty = layer_sums([0, 0], weight=0.0, slots=0.0, balance_loss=0.0, z_loss=0.0, micro_batches=0.0, tokens=0.0)
    assert all(math.isfinite(value) for value in routing_metrics([empty]).values())


def test_every_metric_of_a_layer_is_computed() -> None:
    assert list(layer_values(layer_sums([5, 5, 5, 5]))) == [metric for metric in METRICS if metric.in_every_layer]


@pytest.mark.parametrize(("metric", "value"), [(MOE_DROPPED_PERCENT, 1.0), (MOE_LOAD_CV, Share(1.0, 2.0))])
def test_a_value_that_its_reduction_cannot_take_is_an_error(
    metric: Metric, value: float | Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "layer_values", lambda layer: {metric: value})
    with pytest.raises(TypeError, match=f"{metric.name}: a Share is for"):
        routing_metrics([layer_sums([5, 5, 5, 5])])
