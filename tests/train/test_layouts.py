"""The same run on every layout: losses, gradient norms, held-out loss and weights of one rank are those of N."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.layouts import assemble, small_config, train

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


SPLIT = {  # a model with everything that is cut, replicated or shared in its own way; two sequences at a time
    "model": {"qk_norm": True},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": 32,
        "shared_expert_ffn_size": 16,
        "balance": {"aux_loss": 0.02, "z_loss": 0.001},
    },
    "train": {"micro_batch_size": 2},
    # Adam divides a gradient by its own size: the rounding of one near zero would be a whole step of the weight.
    "optimizer": {"eps": 1e-6},
}


@pytest.fixture(scope="module")
def split_reference(folder: Path) -> dict[str, Any]:
    return run_ranks(1, train, small_config(folder, **SPLIT), STEPS)[0]


@pytest.mark.parametrize(
    ("ranks", "tensor", "sequence", "expert", "expert_tensor", "zero_stage"),
    [
        (2, 2, False, 1, 1, 0),
        (2, 2, False, 2, 1, 1),
        (2, 2, True, 2, 1, 2),
        (2, 2, True, 1, 2, 0),
        (2, 1, False, 1, 2, 1),
        (4, 2, False, 4, 1, 1),
        (4, 2, True, 4, 1, 0),
        (4, 2, True, 2, 1, 2),
        (4, 2, True, 2, 2, 1),
        (4, 2, False, 1, 2, 2),
        (4, 4, True, 4, 1, 1),
        (4, 4, False, 2, 2, 0),
        (4, 4, True, 1, 1, 2),
    ],
)
def test_tensor_layouts_train_the_same_model(
    ranks: int,
    tensor: int,
    sequence: bool,
    expert: int,
    expert_tensor: int,
    zero_stage: int,
    folder: Path,
    split_reference: dict[str, Any],
) -> None:
    parallel = {"tensor": tensor, "sequence": sequence, "expert_tensor": expert_tensor}
    options = {"ranks": ranks, "expert": expert, "zero_stage": zero_stage, "parallel": parallel}
    assert_same_training(run_ranks(ranks, train, small_config(folder, **options, **SPLIT), STEPS), split_reference)


def test_two_levels_take_slices_of_experts_as_they_take_experts(folder: Path, split_reference: dict[str, Any]) -> None:
    parallel = {"tensor": 2, "sequence": True, "expert_tensor": 2, "all_to_all": "hierarchical", "overlap_chunks": 2}
    options = {"expert": 2, "cluster": {"nodes": 2, "devices_per_node": 2}, "parallel": parallel}
    assert_same_training(run_ranks(4, train, small_config(folder, **options, **SPLIT), STEPS), split_reference)


def test_offloaded_optimizer_trains_the_same_model(folder: Path, split_reference: dict[str, Any]) -> None:
    """Another way to the norm in DeepSpeed."""
    options = {"ranks": 4, "expert": 4, "zero_stage": 2, "parallel": {"tensor": 2}}
    offload = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = small_config(folder, **options, **SPLIT, deepspeed=offload)
    assert_same_training(run_ranks(4, train, config, STEPS), split_reference)


def test_balance_over_tensor_ranks_is_that_of_one(folder: Path) -> None:
    balanced = {**SPLIT, "moe": {**BALANCED, "expert_ffn_size": 32}}
    (one,) = run_ranks(1, train, small_config(folder, **balanced), STEPS)
    balanced["train"] = {**balanced["train"], "recompute": "full"}
    options = {"ranks": 4, "expert": 4, "parallel": {"tensor": 2, "sequence": True}}
    results = run_ranks(4, train, small_config(folder, **options, **balanced), STEPS)
    assert_same_training(results, one)
    assert all(torch.equal(result["balance"]["bias"], one["balance"]["bias"]) for result in results)


def test_bf16_norms_are_the_same_in_every_wrapper_and_near_those_of_one_rank(folder: Path) -> None:
    """Between layouts bf16 rounds other sums, by up to 2^-9 of each; between DeepSpeed's wrappers nothing differs.

    One micro-batch per step, because the wrappers differ in how they accumulate.
    """
    short = {**SPLIT, "train": {"micro_batch_size": 2, "precision": "bf16", "batch_tokens": 4 * 32}}
    parallel = {"tensor": 2, "sequence": True, "expert_tensor": 2}
    options = {"ranks": 4, "expert": 2, "parallel": parallel}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    (one,) = run_ranks(1, train, small_config(folder, **short), 3)
    plain = run_ranks(4, train, small_config(folder, **options, **short, zero_stage=0), 3)
    assert plain[0]["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert plain[0]["norms"] == pytest.approx(one["norms"], rel=4e-3)
    for zero_stage, deepspeed in ((1, {}), (1, sums), (2, {})):
        results = run_ranks(
            4, train, small_config(folder, **options, **short, zero_stage=zero_stage, deepspeed=deepspeed), 3
        )
        for result in results:
            assert result["norms"] == pytest.approx(plain[0]["norms"], rel=1e-5)
            assert result["losses"] == pytest.approx(plain[0]["losses"], rel=1e-5)


def assert_same_training(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert result["held_out"] == pytest.approx(reference["held_out"], rel=1e-5)
    whole = assemble([reference["weights"]])
    assert set(assemble([result["weights"] for result in results])) == set(whole)
    for rank, result in enumerate(results):
        for name, part in result["weights"].items():
            where = f"{name} of rank {rank}"
            torch.testing.assert_close(
                part.value, part.of(whole[name]), rtol=1e-4, atol=1e-5, msg=lambda m, w=where: f"{w}: {m}"
            )
