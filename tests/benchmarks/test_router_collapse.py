"""A third of `benchmarks/router_collapse.py`: with any balancing a collapsed router is well on its way, without not."""

from __future__ import annotations

import json

import pytest

from benchmarks.router_collapse import METHODS, NUM_EXPERTS, RECOVERED, ROOT, STEPS, TOP_K, final_load, train

COLLAPSED = NUM_EXPERTS / TOP_K


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_router_recovers_by_balancing_alone(method: str) -> None:
    curves = train(METHODS[method], steps=STEPS // 3)
    assert curves["load_max_over_mean"][0] > 0.97 * COLLAPSED
    assert curves["loss"][-1] < 0.6 * curves["loss"][0], "the model learns"
    if method == "none":
        assert final_load(curves) > 0.9 * COLLAPSED
    else:
        assert final_load(curves) < 0.6 * COLLAPSED


def test_the_published_result_says_the_same_of_the_whole_run() -> None:
    published = json.loads((ROOT / "benchmarks/results/router_collapse.json").read_text(encoding="utf-8"))
    assert published["setting"]["methods"] == METHODS
    assert {name: final_load(curves) < RECOVERED for name, curves in published["curves"].items()} == {
        name: name != "none" for name in METHODS
    }
