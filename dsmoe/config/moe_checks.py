"""What must hold between the keys of `moe`: experts, routing, capacity."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe.config.errors import Problem
from dsmoe.config.nearest import divisors_of, nearest_multiples_of, nearest_of
from dsmoe.config.schema import Config

_ROW_ALIGNMENT = 8
"""grouped_mm reads rows in pieces of 16 bytes: 8 numbers in bf16."""


def _experts(config: Config) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    if moe is None:
        return
    if moe.top_k > moe.num_experts:
        yield "moe.top_k", f"moe.top_k ({moe.top_k}) must be at most moe.num_experts ({moe.num_experts})"
    if moe.top_k == 1 and moe.router.normalize_weights:
        yield (
            "moe.router.normalize_weights",
            "moe.router.normalize_weights (true) with moe.top_k (1) makes every weight 1, so the loss gives the router "
            "no gradient; set moe.router.normalize_weights: false",
        )
    if moe.residual and moe.shared_expert_ffn_size is not None:
        yield (
            "moe.residual",
            f"moe.residual (true) and moe.shared_expert_ffn_size ({moe.shared_expert_ffn_size}) both add a dense "
            "feed-forward that every token passes; remove one: the shared expert is added, the residual MLP is mixed "
            "in by learned coefficients",
        )
    slices = config.parallel.expert_tensor
    for key, size, unit in (
        ("model.hidden_size", model.hidden_size, _ROW_ALIGNMENT),
        ("moe.expert_ffn_size", moe.expert_ffn_size, _ROW_ALIGNMENT * slices),
    ):
        if size % unit:
            nearest = nearest_multiples_of(size, unit)
            each = f" in each of {slices} slices (parallel.expert_tensor)" if unit > _ROW_ALIGNMENT else ""
            yield key, f"{key} ({size}) must be a multiple of {unit} for grouped_mm{each}; nearest: {nearest}"


def _expert_choice(config: Config) -> Iterator[Problem]:
    """Check routing by the experts' choice."""
    if config.moe is None or config.moe.router.choice == "token":
        return
    moe, router = config.moe, config.moe.router
    if not router.leak_future:
        yield (
            "moe.router.choice",
            "moe.router.choice (expert) lets a token of this causal model see the tokens after it: its loss would be "
            "too low, and it could not generate; set moe.router.choice: token, or moe.router.leak_future: true to "
            "train it all the same",
        )
    for name in ("factor", "eval_factor"):
        if getattr(moe.capacity, name) is None:
            key = f"moe.capacity.{name}"
            yield (
                key,
                f"{key} (null) must be set with moe.router.choice: expert, as it says how many tokens an expert takes",
            )
    idle = {
        "moe.router.normalize_weights": (router.normalize_weights, False),
        "moe.router.num_groups": (router.num_groups, 1),
        "moe.router.force_balanced": (router.force_balanced, False),
        "moe.balance.bias_update_rate": (moe.balance.bias_update_rate, 0.0),
        "moe.capacity.target_drop_percent": (moe.capacity.target_drop_percent, None),
    }
    for key, (value, default) in idle.items():
        if value != default:
            shown = "null" if default is None else str(default).lower()
            yield key, f"{key} ({str(value).lower()}) has no meaning with moe.router.choice: expert; set it to {shown}"


def _expert_groups(config: Config) -> Iterator[Problem]:
    """Check group-limited routing; one group is none."""
    if config.moe is None:
        return
    moe, router = config.moe, config.moe.router
    if moe.num_experts % router.num_groups:
        nearest = nearest_of(router.num_groups, divisors_of(moe.num_experts))
        yield (
            "moe.router.num_groups",
            f"moe.router.num_groups ({router.num_groups}) must divide moe.num_experts ({moe.num_experts}); "
            f"nearest: {nearest}",
        )
        return
    size = moe.num_experts // router.num_groups
    within = f"{router.top_k_groups} * {moe.num_experts} / {router.num_groups} = {router.top_k_groups * size}"
    if router.top_k_groups > router.num_groups:
        yield (
            "moe.router.top_k_groups",
            f"moe.router.top_k_groups ({router.top_k_groups}) must be at most moe.router.num_groups "
            f"({router.num_groups})",
        )
    elif router.num_groups > 1 and moe.top_k > router.top_k_groups * size:
        yield (
            "moe.router.top_k_groups",
            f"moe.top_k ({moe.top_k}) must fit into the moe.router.top_k_groups that a token may use ({within} "
            f"experts); raise moe.router.top_k_groups to {-(-moe.top_k // size)}",
        )
    if router.num_groups > 1 and router.group_score == "top2_sum" and size < 2:
        yield (
            "moe.router.group_score",
            f"moe.router.group_score (top2_sum) needs two experts in a group, and moe.router.num_groups "
            f"({router.num_groups}) leaves one; set moe.router.group_score: max",
        )


def _capacity(config: Config) -> Iterator[Problem]:
    if config.moe is None:
        return
    capacity = config.moe.capacity
    target, factor = capacity.target_drop_percent, capacity.factor
    if target is not None and factor is None:
        yield (
            "moe.capacity.target_drop_percent",
            f"moe.capacity.target_drop_percent ({target:g}) needs a moe.capacity.factor to begin with, and that is "
            "null (dropless); set moe.capacity.factor",
        )
    elif target is not None and factor is not None and factor > capacity.max_factor:
        yield (
            "moe.capacity.factor",
            f"moe.capacity.factor ({factor:g}) must be at most moe.capacity.max_factor ({capacity.max_factor:g}) where "
            "moe.capacity.target_drop_percent moves it",
        )
    if capacity.renormalize_dropped and factor is None and capacity.eval_factor is None:
        yield (
            "moe.capacity.renormalize_dropped",
            "moe.capacity.renormalize_dropped (true) would be unused: moe.capacity.factor and eval_factor are null, so "
            "nothing is dropped; remove it",
        )


MOE_CHECKS = (_experts, _expert_choice, _expert_groups, _capacity)
