"""The same run on every layout: losses, gradient norms, held-out loss and weights of one rank are those of N."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.layouts import small_config, train

STEPS = 10
LAYOUTS = [  # ranks, expert degree, ZeRO stage
    (1, 1, 0),
    (1, 1, 2),
    (2, 1, 0),
    (2, 2, 0),
    (2, 2, 1),
    (2, 1, 2),
    (4, 1, 1),
    (4, 2, 0),
    (4, 2, 1),
    (4, 2, 2),
    (4, 4, 0),
    (4, 4, 1),
    (4, 4, 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """One rank, ZeRO stage 1."""
    return run_ranks(1, train, small_config(folder), STEPS)[0]


@pytest.mark.parametrize(("ranks", "expert", "zero_stage"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: int, expert: int, zero_stage: int, folder: Path, reference: dict[str, Any]
) -> None:
    results = run_ranks(ranks, train, small_config(folder, ranks=ranks, expert=expert, zero_stage=zero_stage), STEPS)
    assert_same_training(results, reference)


def test_clipping_was_active_and_training_moved(reference: dict[str, Any]) -> None:
    assert min(reference["norms"]) > 0.5, "the other tests would not see a wrong clip"
    assert reference["losses"][-1] < 0.8 * reference["losses"][0]


def test_losses_are_those_of_the_golden_file(reference: dict[str, Any]) -> None:
    """The numbers of another day: a change that moves them is either a bug or belongs in its commit's message."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "small.json").read_text())
    assert {name: reference[name] for name in golden} == {
        name: pytest.approx(value, rel=1e-4) for name, value in golden.items()
    }


def test_static_padded_exchange_without_drops_is_the_same(folder: Path, reference: dict[str, Any]) -> None:
    """A capacity that nothing can exceed, padded and not: the other two dispatches, the same numbers."""
    for pad in (True, False):
        moe = {"capacity": {"factor": 2.0, "eval_factor": 2.0, "minimum": 32, "pad": pad}}
        results = run_ranks(2, train, small_config(folder, ranks=2, expert=2, moe=moe), STEPS)
        assert_same_training(results, reference)


BALANCED = {  # by what is brought up to date between the steps
    "num_experts": 4,
    "top_k": 2,
    "expert_ffn_size": 24,
    "router": {"score": "sigmoid", "scale": 1.5, "num_groups": 2, "top_k_groups": 1},
    "balance": {"aux_loss": 0.02, "scope": "global", "bias_update_rate": 0.01},
}


@pytest.fixture(scope="module")
def balanced_reference(folder: Path) -> dict[str, Any]:
    return run_ranks(1, train, small_config(folder, moe=BALANCED), STEPS)[0]


@pytest.mark.parametrize(
    ("ranks", "expert", "zero_stage", "recompute"),
    [(1, 1, 1, "full"), (2, 1, 0, "none"), (2, 2, 1, "full"), (4, 2, 2, "none"), (4, 4, 1, "none")],
)
def test_global_balance_is_the_same_on_every_layout(
    ranks: int, expert: int, zero_stage: int, recompute: str, folder: Path, balanced_reference: dict[str, Any]
) -> None:
    config = small_config(
        folder, ranks=ranks, expert=expert, zero_stage=zero_stage, moe=BALANCED, train={"recompute": recompute}
    )
    results = run_ranks(ranks, train, config, STEPS)
    assert_same_training(results, balanced_reference)
    for result in results:
        assert torch.equal(result["balance"]["bias"], balanced_reference["balance"]["bias"])
        assert torch.equal(result["balance"]["load_share"], balanced_reference["balance"]["load_share"])
    assert balanced_reference["balance"]["bias"].abs().max() > 0.01, "the bias moved"


WITH_DENSE = {  # what every token passes, and how it meets the experts
    "shared": {"shared_expert_ffn_size": 40},
    "residual": {"residual": True, "activation": "gelu"},
}


@pytest.fixture(scope="module", params=WITH_DENSE)
def dense_reference(folder: Path, request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The moe section, and the training on one rank."""
    moe = WITH_DENSE[request.param]
    return moe, run_ranks(1, train, small_config(folder, moe=moe), STEPS)[0]


@pytest.mark.parametrize(
    ("ranks", "expert", "zero_stage", "recompute"),
    [(1, 1, 2, "full"), (2, 2, 0, "none"), (2, 2, 1, "full"), (4, 2, 2, "none"), (4, 4, 1, "none")],
)
def test_what_every_token_passes_is_the_same_on_every_layout(
    ranks: int, expert: int, zero_stage: int, recompute: str, folder: Path, dense_reference: tuple[Any, Any]
) -> None:
    moe, reference = dense_reference
    layout = {"ranks": ranks, "expert": expert, "zero_stage": zero_stage}
    results = run_ranks(ranks, train, small_config(folder, **layout, moe=moe, train={"recompute": recompute}), STEPS)
    assert_same_training(results, reference)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str, folder: Path, reference: dict[str, Any]) -> None:
    results = run_ranks(2, train, small_config(folder, ranks=2, expert=2, train={"recompute": recompute}), STEPS)
    assert_same_training(results, reference)


@pytest.mark.parametrize(
    ("nodes", "exchange", "recompute"),
    [
        (1, {"overlap_chunks": 3}, "none"),
        (2, {"all_to_all": "hierarchical"}, "full"),
        (2, {"all_to_all": "hierarchical", "overlap_chunks": 2}, "selective"),
    ],
)
def test_every_exchange_trains_the_same_model(
    nodes: int, exchange: dict[str, Any], recompute: str, folder: Path, reference: dict[str, Any]
) -> None:
    cluster = {"nodes": nodes, "devices_per_node": 4 // nodes}
    config = small_config(folder, expert=4, cluster=cluster, parallel=exchange, train={"recompute": recompute})
    assert_same_training(run_ranks(4, train, config, STEPS), reference)


def assert_same_training(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert result["held_out"] == pytest.approx(reference["held_out"], rel=1e-5)
    seen = set()
    for result in results:
        for name, weight in result["weights"].items():
            seen.add(name)
            torch.testing.assert_close(
                weight, reference["weights"][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert seen == set(reference["weights"])
