from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config import Config
from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.deepspeed import FREE_KEYS, OWNED_KEYS, REFUSED_KEYS
from dsmoe.config.dump import flatten
from dsmoe.config.sections.parallel import world_size
from tests.helpers.recipes import load, problems


def check(folder: Path, *overrides: str) -> list[str]:
    """Return the problems under these overrides without their places."""
    suffixes = (" (command line)", " (x.yaml")
    found = problems(folder, *overrides)
    assert all(any(suffix in problem for suffix in suffixes) for problem in found)
    return [problem.rsplit(" (", 1)[0] for problem in found]


def test_the_valid_config_has_no_problem_and_eight_ranks(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert cross_field_problems(config) == []
    assert world_size(config.cluster) == 8


def test_a_config_made_in_python_is_checked_as_well(tmp_path: Path) -> None:
    config = load(tmp_path)
    tree: dict[str, Any] = config.model_dump()
    tree["moe"]["top_k"] = 9
    found = cross_field_problems(Config.model_validate(tree))
    assert found == [("moe.top_k", "moe.top_k (9) must be at most moe.num_experts (8)")]


# Layout

WORLD = "the number of devices (2 nodes x 4 = 8)"


def test_tensor_must_divide_the_devices_and_the_batch_is_checked_without_it(tmp_path: Path) -> None:
    overrides = "model.num_heads=6", "model.head_dim=16", "model.vocab_size=258", "train.sequence_length=240"
    tensor = f"parallel.tensor (3) must divide {WORLD}; nearest: 2 or 4"
    assert check(tmp_path, "parallel.tensor=3", "train.batch_tokens=960", *overrides) == [tensor]
    assert check(tmp_path, "parallel.tensor=3", "train.batch_tokens=1000", *overrides) == [
        tensor,
        "train.batch_tokens (1000) must be a multiple of train.micro_batch_size * train.sequence_length (2 * 240 = "
        "480), whatever the number of data ranks becomes; nearest: 960 or 1440",
    ]


def test_sliced_sizes_must_be_multiples_of_tensor(tmp_path: Path) -> None:
    overrides = "model.num_heads=6", "model.head_dim=16", "model.dense_layers=1", "model.ffn_size=42"
    assert check(tmp_path, "parallel.tensor=4", "train.sequence_length=250", "train.batch_tokens=1000", *overrides) == [
        "model.num_heads (6) must be a multiple of parallel.tensor (4); the next is 8",
        "model.vocab_size (257) must be a multiple of parallel.tensor (4); the next is 260",
        "train.sequence_length (250) must be a multiple of parallel.tensor (4); the next is 252",
        "model.ffn_size (42) must be a multiple of parallel.tensor (4); the next is 44",
        "model.num_kv_heads (6) and parallel.tensor (4): one must divide the other, so that every rank has equally "
        "many key/value heads",
    ]


def test_the_dense_path_is_sliced_too(tmp_path: Path) -> None:
    fitting = "parallel.tensor=4", "model.vocab_size=260"
    assert check(tmp_path, *fitting, "moe.shared_expert_ffn_size=30") == [
        "moe.shared_expert_ffn_size (30) must be a multiple of parallel.tensor (4); the next is 32"
    ]
    assert load(tmp_path, *fitting, "moe.residual=true")


def test_tensor_layouts_that_fit(tmp_path: Path) -> None:
    assert load(tmp_path, "parallel.tensor=4", "model.vocab_size=260", "model.num_kv_heads=2", "parallel.sequence=true")
    assert load(tmp_path, "parallel.expert_tensor=2", "parallel.expert=4")


def test_sequence_parallelism_needs_tensor_ranks(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.sequence=true") == [
        "parallel.sequence (true) would be unused: parallel.tensor is 1; remove it or raise parallel.tensor"
    ]


def test_slices_of_experts_keep_the_alignment(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert_tensor=2", "moe.expert_ffn_size=24") == [
        "moe.expert_ffn_size (24) must be a multiple of 16 for grouped_mm in each of 2 slices "
        "(parallel.expert_tensor); nearest: 16 or 32"
    ]


def test_expert_must_divide_num_experts(tmp_path: Path) -> None:
    overrides = "cluster.nodes=30", "parallel.expert=8", "moe.num_experts=60", "train.batch_tokens=61440"
    assert check(tmp_path, *overrides) == ["parallel.expert (8) must divide moe.num_experts (60); nearest: 6 or 10"]


def test_a_degree_that_fits_the_devices_too_is_named_where_the_nearest_do_not(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert=8", "moe.num_experts=60") == [
        "parallel.expert (8) must divide moe.num_experts (60); nearest: 6 or 10 (4 divides the 8 devices as well)"
    ]


def test_expert_above_num_experts_has_one_neighbour(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert=8", "moe.num_experts=4") == [
        "parallel.expert (8) must divide moe.num_experts (4); nearest: 4"
    ]


def test_expert_must_divide_the_devices(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert=6", "moe.num_experts=12") == [
        f"parallel.expert * parallel.expert_tensor (6 * 1 = 6) must divide {WORLD}; nearest parallel.expert: 4 or 8"
    ]


def test_expert_times_expert_tensor_must_divide_the_devices(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert=8", "parallel.expert_tensor=2") == [
        f"parallel.expert * parallel.expert_tensor (8 * 2 = 16) must divide {WORLD}; nearest parallel.expert: 4"
    ]


def test_no_expert_degree_fits_beside_an_expert_tensor_degree_that_does_not(tmp_path: Path) -> None:
    assert check(tmp_path, "parallel.expert_tensor=3", "moe.expert_ffn_size=48") == [
        f"parallel.expert * parallel.expert_tensor (4 * 3 = 12) must divide {WORLD}; "
        "nearest parallel.expert_tensor: 2 or 4"
    ]


def test_expert_parallelism_needs_experts(tmp_path: Path) -> None:
    assert check(tmp_path, "moe=null", "model.ffn_size=128") == [
        "parallel.expert (4) needs experts, but moe is null; set parallel.expert: 1 or give moe"
    ]


@pytest.mark.parametrize(("expert", "per_node"), [(4, 4), (4, 2), (4, 1), (4, 8), (2, 4)])
def test_two_levels_with_whole_nodes_or_one(tmp_path: Path, expert: int, per_node: int) -> None:
    cluster = f"cluster.nodes={8 // per_node}", f"cluster.devices_per_node={per_node}"
    config = load(tmp_path, *cluster, f"parallel.expert={expert}", "parallel.all_to_all=hierarchical")
    assert config.parallel.all_to_all == "hierarchical"


def test_two_levels_with_uneven_parts_of_nodes_are_refused(tmp_path: Path) -> None:
    overrides = "cluster.nodes=4", "cluster.devices_per_node=6", "train.batch_tokens=49152"
    load(tmp_path, *overrides, "parallel.expert=4")
    assert check(tmp_path, *overrides, "parallel.expert=4", "parallel.all_to_all=hierarchical") == [
        "parallel.all_to_all (hierarchical) wants a copy of the experts to be on whole nodes, or within one: "
        "parallel.expert * parallel.expert_tensor (4 * 1 = 4) must be a multiple or a divisor of "
        "cluster.devices_per_node (6); change one of them, or set parallel.all_to_all: flat"
    ]


# Experts and layers


def test_top_k_is_at_most_num_experts(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.top_k=9") == ["moe.top_k (9) must be at most moe.num_experts (8)"]
    assert load(tmp_path, "moe.top_k=8")


def test_top_1_with_normalized_weights_would_not_train_the_router(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.top_k=1") == [
        "moe.router.normalize_weights (true) with moe.top_k (1) makes every weight 1, so the loss gives the router no "
        "gradient; set moe.router.normalize_weights: false"
    ]
    assert load(tmp_path, "moe.top_k=1", "moe.router.normalize_weights=false")


def test_top_1_with_normalized_sigmoids_would_not_train_the_router_either(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, "moe.top_k=1", "moe.router.score=sigmoid")
    assert problem.startswith("moe.router.normalize_weights (true) with moe.top_k (1) makes every weight 1")


def test_a_shared_expert_and_a_residual_mlp_are_one_too_many(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.residual=true", "moe.shared_expert_ffn_size=64") == [
        "moe.residual (true) and moe.shared_expert_ffn_size (64) both add a dense feed-forward that every token "
        "passes; remove one: the shared expert is added, the residual MLP is mixed in by learned coefficients"
    ]
    assert load(tmp_path, "moe.residual=true").moe.residual
    assert load(tmp_path, "moe.shared_expert_ffn_size=64").moe.shared_expert_ffn_size == 64


def test_groups_must_divide_the_experts(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.router.num_groups=3") == [
        "moe.router.num_groups (3) must divide moe.num_experts (8); nearest: 2 or 4"
    ]


def test_best_groups_are_some_of_the_groups(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.router.num_groups=2", "moe.router.top_k_groups=3") == [
        "moe.router.top_k_groups (3) must be at most moe.router.num_groups (2)"
    ]
    assert check(tmp_path, "moe.router.top_k_groups=2") == [
        "moe.router.top_k_groups (2) must be at most moe.router.num_groups (1)"
    ]


def test_top_k_must_fit_into_the_best_groups(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.router.num_groups=4", "moe.top_k=3") == [
        "moe.top_k (3) must fit into the moe.router.top_k_groups that a token may use (1 * 8 / 4 = 2 experts); "
        "raise moe.router.top_k_groups to 2"
    ]
    assert load(tmp_path, "moe.router.num_groups=4", "moe.top_k=3", "moe.router.top_k_groups=2")


def test_the_best_two_of_a_group_need_two_in_it(tmp_path: Path) -> None:
    overrides = ["moe.router.num_groups=8", "moe.router.top_k_groups=4"]
    assert check(tmp_path, *overrides) == [
        "moe.router.group_score (top2_sum) needs 2 experts in a group, and moe.router.num_groups (8) leaves 1; "
        "set moe.router.group_score: max"
    ]
    assert load(tmp_path, *overrides, "moe.router.group_score=max")


def test_a_drop_rate_needs_a_factor_below_the_ceiling(tmp_path: Path) -> None:
    assert check(tmp_path, "moe.capacity.factor=null", "moe.capacity.target_drop_percent=2.0") == [
        "moe.capacity.target_drop_percent (2) needs a moe.capacity.factor to begin with, and that is null (dropless); "
        "set moe.capacity.factor"
    ]
    assert check(tmp_path, "moe.capacity.factor=2.5", "moe.capacity.target_drop_percent=2.0") == [
        "moe.capacity.factor (2.5) must be at most moe.capacity.max_factor (2) where "
        "moe.capacity.target_drop_percent moves it"
    ]
    assert load(tmp_path, "moe.capacity.factor=1.25", "moe.capacity.target_drop_percent=2.0")


def test_weights_of_dropped_choices_need_drops(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, "moe.capacity.factor=null", "moe.capacity.renormalize_dropped=true")
    assert problem.startswith("moe.capacity.renormalize_dropped (true) would be unused")
    assert load(tmp_path, "moe.capacity.eval_factor=1.5", "moe.capacity.renormalize_dropped=true")


EXPERTS_CHOOSE = (
    "moe.router.choice=expert",
    "moe.router.normalize_weights=false",
    "moe.capacity.factor=1.0",
    "moe.capacity.eval_factor=1.0",
)


def test_experts_choose_only_where_it_is_asked_for_twice(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, *EXPERTS_CHOOSE)
    assert problem.startswith("moe.router.choice (expert) lets a token of this causal model see the tokens after it")
    assert problem.endswith("or moe.router.leak_future: true to train it all the same")
    assert load(tmp_path, *EXPERTS_CHOOSE, "moe.router.leak_future=true")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("moe.capacity.factor=null", "moe.capacity.factor (null) must be set with moe.router.choice: expert"),
        ("moe.capacity.eval_factor=null", "moe.capacity.eval_factor (null) must be set"),
        ("moe.router.normalize_weights=true", "moe.router.normalize_weights (true) has no meaning"),
        ("moe.router.force_balanced=true", "moe.router.force_balanced (true) has no meaning"),
        ("moe.balance.bias_update_rate=0.1", "moe.balance.bias_update_rate (0.1) has no meaning"),
        ("moe.capacity.target_drop_percent=1.0", "moe.capacity.target_drop_percent (1.0) has no meaning"),
    ],
)
def test_options_without_meaning_for_expert_choice_are_refused(tmp_path: Path, override: str, problem: str) -> None:
    (found,) = check(tmp_path, *EXPERTS_CHOOSE, "moe.router.leak_future=true", override)
    assert found.startswith(problem)


def test_widths_suit_grouped_mm(tmp_path: Path) -> None:
    assert check(tmp_path, "model.hidden_size=60", "model.num_heads=2", "moe.expert_ffn_size=4") == [
        "model.hidden_size (60) must be a multiple of 8 for grouped_mm; nearest: 56 or 64",
        "moe.expert_ffn_size (4) must be a multiple of 8 for grouped_mm; nearest: 8",
    ]


def test_a_dense_model_may_have_any_width(tmp_path: Path) -> None:
    assert load(
        tmp_path, "moe=null", "parallel.expert=1", "model.ffn_size=100", "model.hidden_size=100", "model.num_heads=5"
    )


def test_kv_heads_divide_heads(tmp_path: Path) -> None:
    assert check(tmp_path, "model.num_kv_heads=3") == [
        "model.num_kv_heads (3) must divide model.num_heads (4); nearest: 2 or 4"
    ]
    assert load(tmp_path, "model.num_kv_heads=2")


def test_heads_divide_the_width_unless_head_dim_is_given(tmp_path: Path) -> None:
    assert check(tmp_path, "model.num_heads=5") == [
        "model.num_heads (5) must divide model.hidden_size (64); nearest: 4 or 8, or set model.head_dim"
    ]
    assert load(tmp_path, "model.num_heads=5", "model.head_dim=16")


def test_head_dim_is_even(tmp_path: Path) -> None:
    reason = "must be even, because rotary positions turn pairs"
    assert check(tmp_path, "model.head_dim=15") == [f"model.head_dim (15) {reason}; nearest: 14 or 16"]
    assert check(tmp_path, "model.num_heads=64") == [
        f"model.hidden_size / model.num_heads (64 / 64 = 1) {reason}; change one of them or set model.head_dim"
    ]


NO_MOE_LAYER = "leave no MoE layer; dense_layers + moe_every must be at most num_layers, or set moe: null"


@pytest.mark.parametrize(("dense", "every"), [(4, 1), (0, 5), (3, 2), (9, 1)])
def test_some_layer_is_an_moe_layer(tmp_path: Path, dense: int, every: int) -> None:
    overrides = f"model.dense_layers={dense}", f"model.moe_every={every}", "model.ffn_size=128"
    assert check(tmp_path, *overrides) == [
        f"model.num_layers (4), model.dense_layers ({dense}) and model.moe_every ({every}) {NO_MOE_LAYER}"
    ]


@pytest.mark.parametrize(
    ("overrides", "num_dense"),
    [
        (("model.dense_layers=1",), 1),
        (("model.moe_every=2",), 2),
        (("model.dense_layers=1", "model.moe_every=2"), 3),
        (("model.dense_layers=3",), 3),
        (("moe=null", "parallel.expert=1"), 4),
    ],
)
def test_dense_layers_need_ffn_size(tmp_path: Path, overrides: tuple[str, ...], num_dense: int) -> None:
    assert check(tmp_path, *overrides) == [
        f"model.ffn_size is missing: {num_dense} of 4 layers are dense; set it to their inner width"
    ]
    assert load(tmp_path, *overrides, "model.ffn_size=128")


def test_ffn_size_without_a_dense_layer_would_be_unused(tmp_path: Path) -> None:
    assert check(tmp_path, "model.ffn_size=128") == [
        "model.ffn_size (128) would be unused: all 4 layers are MoE layers, whose width is moe.expert_ffn_size; "
        "remove it"
    ]


# Length and batch


def test_sequences_fit_the_model(tmp_path: Path) -> None:
    assert check(tmp_path, "train.sequence_length=512") == [
        "train.sequence_length (512) must be at most model.max_sequence_length (256); lower the one or raise the other"
    ]


def test_neither_steps_nor_tokens(tmp_path: Path) -> None:
    assert check(tmp_path, "train.steps=null") == [
        "train.steps or train.tokens must say how long to train; set one of them"
    ]


def test_both_steps_and_tokens(tmp_path: Path) -> None:
    assert check(tmp_path, "train.tokens=1e6") == [
        "train.steps (100) and train.tokens (1000000) are both set; remove one, or set it to null if it is included"
    ]


def test_tokens_for_at_least_one_step(tmp_path: Path) -> None:
    assert check(tmp_path, "train.steps=null", "train.tokens=8191") == [
        "train.tokens (8191) must be at least train.batch_tokens (8192), one step"
    ]
    assert load(tmp_path, "train.steps=null", "train.tokens=8192")


@pytest.mark.parametrize(("tokens", "nearest"), [(1000, "4096"), (8191, "4096 or 8192"), (10_000, "8192 or 12288")])
def test_the_batch_is_a_whole_number_of_passes(tmp_path: Path, tokens: int, nearest: str) -> None:
    assert check(tmp_path, f"train.batch_tokens={tokens}") == [
        f"train.batch_tokens ({tokens}) must be a multiple of data ranks * train.micro_batch_size * "
        f"train.sequence_length (8 * 2 * 256 = 4096); nearest: {nearest}"
    ]


def test_the_data_degree_is_the_devices_over_the_tensor_degree(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, "parallel.tensor=2", "model.vocab_size=258", "train.batch_tokens=1000")
    assert "(4 * 2 * 256 = 2048); nearest: 2048" in problem


# Learning rate


def test_min_lr_is_at_most_lr(tmp_path: Path) -> None:
    assert check(tmp_path, "optimizer.min_lr=0.01") == ["optimizer.min_lr (0.01) must be at most optimizer.lr (0.001)"]
    assert load(tmp_path, "optimizer.min_lr=0.001")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_decay_steps_belong_to_wsd(tmp_path: Path, schedule: str) -> None:
    assert check(tmp_path, f"optimizer.schedule={schedule}", "optimizer.decay_steps=10") == [
        f"optimizer.decay_steps (10) would be unused: optimizer.schedule is {schedule}; remove it or set "
        "optimizer.schedule: wsd"
    ]


def test_warmup_is_shorter_than_the_run(tmp_path: Path) -> None:
    assert check(tmp_path, "optimizer.warmup_steps=100") == [
        "optimizer.warmup_steps (100) must be less than the number of steps (100, from train.steps)"
    ]
    assert load(tmp_path, "optimizer.warmup_steps=99")


def test_the_steps_may_come_from_tokens(tmp_path: Path) -> None:
    overrides = "train.steps=null", "train.tokens=90000", "optimizer.warmup_steps=10"
    assert check(tmp_path, *overrides) == [
        "optimizer.warmup_steps (10) must be less than the number of steps (10 = train.tokens // train.batch_tokens)"
    ]


def test_warmup_and_decay_fit_the_run(tmp_path: Path) -> None:
    wsd = "optimizer.schedule=wsd", "optimizer.warmup_steps=60"
    assert check(tmp_path, *wsd, "optimizer.decay_steps=41") == [
        "optimizer.warmup_steps (60) + optimizer.decay_steps (41) must be at most the number of steps (100, from "
        "train.steps); with this warm-up, decay_steps can be up to 40"
    ]
    assert load(tmp_path, *wsd, "optimizer.decay_steps=40")


def test_warmup_and_the_default_decay_fit_the_run(tmp_path: Path) -> None:
    assert check(tmp_path, "optimizer.schedule=wsd", "optimizer.warmup_steps=81") == [
        "optimizer.warmup_steps (81) + optimizer.decay_steps (20, a fifth of the steps) must be at most the number of "
        "steps (100, from train.steps); with this warm-up, decay_steps can be up to 19"
    ]
    assert load(tmp_path, "optimizer.schedule=wsd", "optimizer.warmup_steps=80")


# Data


def test_a_source_needs_a_place(tmp_path: Path) -> None:
    assert check(tmp_path, "data.sources.1.path=null") == [
        "data.sources.1.path or data.sources.1.hub must say where the text is; set one of them"
    ]


def test_a_source_has_one_place(tmp_path: Path) -> None:
    assert check(tmp_path, "data.sources.0.hub=org/set") == [
        'data.sources.0.path ("builtin:shakespeare") and data.sources.0.hub ("org/set") are both set; remove one'
    ]


def test_format_is_for_files(tmp_path: Path) -> None:
    hub = "data.sources=[{name: a, hub: org/set, split: test}]"
    assert load(tmp_path, hub)
    assert check(tmp_path, hub, "data.sources.0.format=parquet") == [
        "data.sources.0.format (parquet) is for files, and this source is a hub data set; remove it"
    ]


def test_split_is_for_hub_data_sets(tmp_path: Path) -> None:
    assert check(tmp_path, "data.sources.0.split=test") == [
        'data.sources.0.split ("test") is for hub data sets, and this source is a path; remove it'
    ]


@pytest.mark.parametrize("weight", ["1e-300", "1e-20"])
def test_a_weight_too_small_for_any_sample_is_refused(weight: str, tmp_path: Path) -> None:
    first, second = "data.sources.0.weight=1e30", f"data.sources.1.weight={weight}"
    assert check(tmp_path, first, second) == [
        f"data.sources.1.weight ({float(weight):g}) is {float(weight) / 1e30:.1g} of all weights (1e+30), of which no "
        "run would see a sequence; leave the source out, or give it a larger weight"
    ]
    load(tmp_path, "data.sources.0.weight=1000", "data.sources.1.weight=1e-10")


def test_source_names_are_unique(tmp_path: Path) -> None:
    assert check(tmp_path, "data.sources.1.name=plays") == [
        'data.sources.1.name ("plays") is taken by an earlier source; give it another name'
    ]


def test_bytes_need_257_rows(tmp_path: Path) -> None:
    assert check(tmp_path, "model.vocab_size=256") == [
        "model.vocab_size (256) must be at least 257 for data.tokenizer: bytes (256 byte values and the end of a "
        "document)"
    ]
    assert load(tmp_path, "model.vocab_size=256", "data.tokenizer=tokenizer.json")


# Checkpoint, observe and DeepSpeed


def test_milestones_are_steps_that_are_saved(tmp_path: Path) -> None:
    assert check(tmp_path, "checkpoint.every=10", "checkpoint.keep_every=25") == [
        "checkpoint.keep_every (25) must be a multiple of checkpoint.every (10); nearest: 20 or 30"
    ]
    assert (
        "checkpoint.every (null); set that" in check(tmp_path, "checkpoint.every=null", "checkpoint.keep_every=25")[0]
    )
    assert load(tmp_path, "checkpoint.every=10", "checkpoint.keep_every=30")


def test_the_best_are_known_where_evaluations_fall_on_saved_steps(tmp_path: Path) -> None:
    for evaluations in ("null", "15"):
        assert check(tmp_path, "checkpoint.every=10", "checkpoint.keep_best=1", f"train.eval_every={evaluations}") == [
            "checkpoint.keep_best (1) goes by evaluations of the steps that are saved: train.eval_every "
            f"({evaluations}) and checkpoint.every (10) must be set, and one a multiple of the other"
        ]
    assert load(tmp_path, "checkpoint.every=10", "checkpoint.keep_best=1", "train.eval_every=5")
    assert load(tmp_path, "checkpoint.every=10", "checkpoint.keep_best=1", "train.eval_every=20")


def test_layer_detail_falls_on_logged_steps(tmp_path: Path) -> None:
    assert check(tmp_path, "observe.log_every=10", "observe.layer_detail_every=25") == [
        "observe.layer_detail_every (25) must be a multiple of observe.log_every (10); nearest: 20 or 30"
    ]
    assert load(tmp_path, "observe.log_every=10", "observe.layer_detail_every=30")


@pytest.mark.parametrize(("key", "ours"), OWNED_KEYS.items())
def test_keys_that_dsmoe_sets_are_refused(tmp_path: Path, key: str, ours: str | None) -> None:
    remedy = f"remove it and use {ours}" if ours else "remove it"
    assert check(tmp_path, f"deepspeed.{key}=1") == [f"deepspeed.{key} is set by dsmoe; {remedy}"]


def test_every_key_named_as_a_remedy_exists(tmp_path: Path) -> None:
    tree = load(tmp_path).model_dump()
    for ours in filter(None, OWNED_KEYS.values()):
        section, _, key = ours.removeprefix("the ").removesuffix(" section").partition(".")
        assert not key or key in tree[section]
        assert section in tree


def test_zero_optimization_is_a_mapping(tmp_path: Path) -> None:
    assert check(tmp_path, "deepspeed.zero_optimization=true") == [
        f"deepspeed.zero_optimization: expected a mapping of {', '.join(FREE_KEYS['zero_optimization'])}, got true"
    ]


def test_other_deepspeed_keys_pass(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed={zero_optimization: {reduce_bucket_size: 1000}, comms_logger: {}}")
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {}}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_deepspeed_keys_that_cannot_be_honoured_are_refused_with_advice(tmp_path: Path, key: str) -> None:
    given = key.replace("*", "max_live_parameters")
    advice = f"deepspeed.{given} cannot be used with dsmoe: {REFUSED_KEYS[key]}; remove it"
    for value in ("true", "{enabled: true}", "{}"):
        assert check(tmp_path, f"deepspeed.{given}={value}") == [advice]


def test_every_key_that_refusals_advise_exists(tmp_path: Path) -> None:
    tree = flatten(load(tmp_path).model_dump())
    for advice in REFUSED_KEYS.values():
        for key in re.findall(r"\b(?:parallel|train|optimizer|observe|checkpoint|data)\.[a-z_]+", advice):
            assert key in tree


def test_an_offloaded_optimizer_needs_zero(tmp_path: Path) -> None:
    assert load(tmp_path, "optimizer.offload=true").optimizer.offload
    (problem,) = check(tmp_path, "optimizer.offload=true", "parallel.zero_stage=0")
    assert problem.startswith("optimizer.offload (true) needs parallel.zero_stage (0) to be 1 or 2")


def test_keys_unknown_to_deepspeed_are_refused(tmp_path: Path) -> None:
    assert check(tmp_path, "deepspeed.comms_loger={}", "deepspeed.train_batchsize=8") == [
        "deepspeed.comms_loger: unknown to DeepSpeed; did you mean 'comms_logger'?",
        f"deepspeed.train_batchsize: unknown to DeepSpeed; the keys are {', '.join(FREE_KEYS)}",
    ]
    (problem,) = check(tmp_path, 'deepspeed={"q.q": 1}')
    assert problem == f"deepspeed.q.q: unknown to DeepSpeed; the keys are {', '.join(FREE_KEYS)}"
    (problem,) = check(tmp_path, 'deepspeed={"zero_optimization.stage": 1}')
    assert problem.startswith("deepspeed.zero_optimization.stage: unknown to DeepSpeed; ")


def test_keys_below_zero_optimization_that_deepspeed_refuses_are_refused_here(tmp_path: Path) -> None:
    section = "{reduce_bucket_siz: 1, contiguous_gradient: true, stage3_max_live_parameter: 1, super_offload: true}"
    assert check(tmp_path, f"deepspeed.zero_optimization={section}") == [
        "deepspeed.zero_optimization.reduce_bucket_siz: unknown to DeepSpeed; did you mean 'reduce_bucket_size'?",
        "deepspeed.zero_optimization.contiguous_gradient: unknown to DeepSpeed; the keys are "
        + ", ".join(FREE_KEYS["zero_optimization"]),
    ] + [
        f"deepspeed.zero_optimization.{name} cannot be used with dsmoe: {REFUSED_KEYS[pattern]}; remove it"
        for name, pattern in (
            ("stage3_max_live_parameter", "zero_optimization.stage3_*"),
            ("super_offload", "zero_optimization.super_offload"),
        )
    ]


@pytest.mark.parametrize("key", ["cpu_offload_param", "sub_group_size", "max_live_parameters", "elastic_checkpoint"])
def test_keys_of_zero_that_stages_1_and_2_do_not_use_are_refused(key: str, tmp_path: Path) -> None:
    (problem,) = check(tmp_path, f"deepspeed.zero_optimization.{key}=1")
    assert problem.startswith(f"deepspeed.zero_optimization.{key} cannot be used with dsmoe: ")


def test_guesses_are_keys_that_may_be_set(tmp_path: Path) -> None:
    for wrong in ("fp61", "pipelin", "autotunin", "schedule", "tensorboards", "zero_optimisation"):
        (problem,) = check(tmp_path, f"deepspeed.{wrong}={{}}")
        guess = re.search("did you mean '(.*)'", problem)
        assert guess is None or guess[1] in FREE_KEYS, problem
    assert "did you mean 'zero_optimization'?" in problem


def test_all_problems_come_together(tmp_path: Path) -> None:
    overrides = "parallel.expert=3", "moe.top_k=9", "train.batch_tokens=1", "deepspeed.fp16={}", "model.num_kv_heads=3"
    assert [problem.split(" ", 1)[0] for problem in check(tmp_path, *overrides)] == [
        "parallel.expert",
        "parallel.expert",
        "model.num_kv_heads",
        "moe.top_k",
        "train.batch_tokens",
        "deepspeed.fp16",
    ]


def test_keys_that_deepspeeds_engine_does_not_read_are_refused(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, "deepspeed.activation_checkpointing={partition_activations: true}")
    assert problem.startswith("deepspeed.activation_checkpointing cannot be used with dsmoe: ")
    assert "train.recompute" in problem
