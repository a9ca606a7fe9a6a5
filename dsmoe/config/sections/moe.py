"""The section `moe`: experts, router, balance and capacity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import (
    Devices,
    Effect,
    MathEffect,
    NonNegativeFloat,
    Percent,
    PositiveFloat,
    PositiveInt,
    Section,
    Switch,
    TensorEffect,
    Width,
    whole_number,
)
from dsmoe.config.sections.parallel import uneven_problems
from dsmoe.config.suggestions import divisors_of, nearest_multiples_of, nearest_of

BalanceScope = Literal["micro_batch", "sequence", "global"]

# The running counts of a global balancing loss and a moving capacity factor may begin anew; a selection bias is part of
# the model's function.
_SCOPE = Switch("is global", lambda scope: scope == "global", "step")
_BIAS = Switch("is above 0", lambda rate: rate > 0, "tensor")
_MOVING_FACTOR = Switch("is set", lambda percent: percent is not None, "step")


class Router(Section):
    """The choice of each token's experts and their weights from the router's scores, always in fp32."""

    choice: TensorEffect[Literal["token", "expert"]] = "token"
    """Every token chooses its top_k experts, or every expert its C tokens (top_k on average; Zhou et al. 2022)."""
    leak_future: MathEffect[bool] = False
    """Confirms that `choice: expert` may let a token see later tokens, which makes training losses too low and text
    generation impossible."""
    score: TensorEffect[Literal["softmax", "sigmoid"]] = "softmax"
    """`softmax` over the experts (Mixtral, Qwen3), or the `sigmoid` of each logit (DeepSeek-V3)."""
    normalize_weights: TensorEffect[bool] = True
    """Divide the k chosen scores by their sum (Mixtral, Qwen3); false keeps the scores themselves (Switch)."""
    scale: TensorEffect[PositiveFloat] = 1.0
    """Factor on the weights after normalization (DeepSeek-V3: 2.5)."""
    num_groups: TensorEffect[Devices] = 1
    """Groups of neighbouring experts, as nodes hold them; with more than one, each token keeps to its best groups."""
    top_k_groups: TensorEffect[Devices] = 1
    """Groups from which a token may choose its experts."""
    group_score: TensorEffect[Literal["max", "top2_sum"]] = "top2_sum"
    """Score of a group: its best expert's score (DeepSeek-V2) or the sum of its best two (DeepSeek-V3)."""
    noise: MathEffect[Literal["none", "jitter", "gumbel"]] = "none"
    """In training only: the router's input times 1 +- 0.01 (`jitter`), or experts drawn at random in proportion to
    their softmax scores (`gumbel`)."""
    force_balanced: MathEffect[bool] = False
    """For benchmarks only: tokens take the experts in turn, so that every expert has the same load."""


class Balance(Section):
    """Balancing of the experts' load, by any combination of methods; 0 switches one off."""

    aux_loss: MathEffect[NonNegativeFloat] = 0.01
    """Coefficient of the Switch/GShard load-balancing loss."""
    scope: Annotated[BalanceScope, Effect("math", _SCOPE)] = "micro_batch"
    """Tokens over which that loss counts the experts' shares: a rank's micro-batch, each sequence (DeepSeek-V3), or all
    ranks and micro-batches of the optimizer step before."""
    z_loss: MathEffect[NonNegativeFloat] = 0.0
    """Coefficient of the ST-MoE router z-loss."""
    bias_update_rate: Annotated[NonNegativeFloat, Effect("math", _BIAS)] = 0.0
    """Balance by a bias on the choice of experts that moves by this much per step (DeepSeek-V3: 0.001)."""


class Capacity(Section):
    """The limit on an expert's assignments from one rank, of its micro-batch or `parallel.tensor` slice of one."""

    factor: MathEffect[PositiveFloat | None] = None
    """C = max(minimum, ceil(tokens * top_k / num_experts * factor)); null is dropless."""
    eval_factor: MathEffect[PositiveFloat | None] = None
    """The factor in evaluation; null evaluates dropless."""
    minimum: MathEffect[PositiveInt] = 4
    """The smallest C, for micro-batches with few tokens."""
    drop_policy: MathEffect[Literal["probability", "position", "random"]] = "probability"
    """Assignments that stay: the highest router weights, the first in sequence order, or any with equal chance."""
    renormalize_dropped: MathEffect[bool] = False
    """Spread the weight of a token's dropped choices over its kept ones."""
    target_drop_percent: Annotated[Percent | None, Effect("math", _MOVING_FACTOR)] = None
    """Share of the assignments to drop, toward which the factor moves slowly, on log steps; null keeps the factor."""
    max_factor: MathEffect[PositiveFloat] = 2.0
    """The highest factor that `target_drop_percent` may lead to, which bounds the memory."""
    pad: MathEffect[bool] = True
    """Exchange full [E, C, D] buffers (static shapes, no host read) instead of only what is kept."""


@dataclass(frozen=True)
class ActivationShape:
    """The properties of an activation that decide the shapes of weights, and so parameters and FLOPs.

    Attributes:
        gated: act(gate x) * (up x) rather than act(up x).
        hidden_act: Hugging Face's name of the gate's function; None if its experts cannot have it.
    """

    gated: bool
    hidden_act: str | None = None

    @property
    def input_matrices(self) -> int:
        """The number of matrices that the input is multiplied by: gate and up, or up alone."""
        return 2 if self.gated else 1

    @property
    def matrices(self) -> int:
        """The number of all matrices of a feed-forward: the input matrices and down."""
        return self.input_matrices + 1


ACTIVATION_SHAPES = {
    "swiglu": ActivationShape(gated=True, hidden_act="silu"),
    "geglu": ActivationShape(gated=True, hidden_act="gelu"),
    "gelu": ActivationShape(gated=False),
    "relu2": ActivationShape(gated=False),
}
"""Shapes by the names of `moe.activation`; `dsmoe.nn.activations` has the functions."""

LEAST_IN_GROUP = {"max": 1, "top2_sum": 2}
"""The fewest experts of a group for each `moe.router.group_score`."""


class Experts(Section):
    """The feed-forwards of an MoE layer: the experts', and the dense one that every token passes besides, if any."""

    expert_ffn_size: TensorEffect[Width | None] = None
    """Inner width of one expert; null where the experts are copies of a module (`dsmoe.MoE(expert=...)`)."""
    shared_expert_ffn_size: TensorEffect[Width | None] = None
    """Inner width of a shared expert, which every token passes besides its own (DeepSeek); null means none."""
    residual: TensorEffect[bool] = False
    """Mix the experts' output with a dense MLP's of `expert_ffn_size` by learned coefficients (PR-MoE)."""
    activation: TensorEffect[Literal["swiglu", "geglu", "gelu", "relu2"]] = "swiglu"
    """The activation of all of these: gated (SwiGLU, GEGLU: three matrices each) or not (GELU, squared ReLU: two)."""


class Moe(Experts):
    """The expert layers; `moe: null` trains the dense model."""

    num_experts: TensorEffect[Annotated[int, Field(ge=2, le=65_536), BeforeValidator(whole_number)]]
    """Experts in each MoE layer, over the whole cluster."""
    top_k: TensorEffect[Devices] = 2
    """Experts that each token visits."""
    expert_ffn_size: TensorEffect[Width]
    """Inner width of one expert."""
    router: Router = Router()
    """The choice of a token's experts."""
    balance: Balance = Balance()
    """Balancing of the experts' load."""
    capacity: Capacity = Capacity()
    """The limit on what an expert accepts."""

    @property
    def experts(self) -> Experts:
        """The keys of the feed-forwards alone, for the layer."""
        return Experts(**{name: getattr(self, name) for name in Experts.model_fields})


_ROW_ALIGNMENT = 8
"""Elements per row have to be a multiple of this: grouped_mm reads 16 bytes at a time, 8 numbers in bf16."""


def choice_problems(num_experts: int, top_k: int, router: Router) -> Iterator[Problem]:
    """Check that `top_k` experts exist, and that their weights give the router a gradient."""
    if top_k > num_experts:
        yield "moe.top_k", f"moe.top_k ({top_k}) must be at most moe.num_experts ({num_experts})"
    if top_k == 1 and router.normalize_weights:
        yield (
            "moe.router.normalize_weights",
            "moe.router.normalize_weights (true) with moe.top_k (1) makes every weight 1, so the loss gives the router "
            "no gradient; set moe.router.normalize_weights: false",
        )


def dense_path_problems(experts: Experts) -> Iterator[Problem]:
    """Check that there is at most one dense path."""
    if experts.residual and experts.shared_expert_ffn_size is not None:
        yield (
            "moe.residual",
            f"moe.residual (true) and moe.shared_expert_ffn_size ({experts.shared_expert_ffn_size}) both add a dense "
            "feed-forward that every token passes; remove one: the shared expert is added, the residual MLP is mixed "
            "in by learned coefficients",
        )


def dense_path_slice_problems(experts: Experts, tensor: int) -> Iterator[Problem]:
    """Check that tensor ranks get equal slices of the dense path."""
    sizes = {"moe.shared_expert_ffn_size": experts.shared_expert_ffn_size}
    if experts.residual:
        sizes["moe.expert_ffn_size"] = experts.expert_ffn_size
    yield from uneven_problems(sizes, tensor)


def row_problems(hidden_size: int, expert_ffn_size: int, slices: int) -> Iterator[Problem]:
    """Check that the experts' rows are aligned for grouped products; `slices` is `parallel.expert_tensor`."""
    for key, size, unit in (
        ("model.hidden_size", hidden_size, _ROW_ALIGNMENT),
        ("moe.expert_ffn_size", expert_ffn_size, _ROW_ALIGNMENT * slices),
    ):
        if size % unit:
            nearest = nearest_multiples_of(size, unit)
            each = f" in each of {slices} slices (parallel.expert_tensor)" if unit > _ROW_ALIGNMENT else ""
            yield key, f"{key} ({size}) must be a multiple of {unit} for grouped_mm{each}; nearest: {nearest}"


def causal_problems(router: Router) -> Iterator[Problem]:
    """Check that a token's experts do not depend on later tokens, unless `leak_future` allows it."""
    if router.choice == "expert" and not router.leak_future:
        yield (
            "moe.router.choice",
            "moe.router.choice (expert) lets a token of this causal model see the tokens after it: its loss would be "
            "too low, and it could not generate; set moe.router.choice: token, or moe.router.leak_future: true to "
            "train it all the same",
        )


def expert_choice_problems(router: Router, balance: Balance, capacity: Capacity) -> Iterator[Problem]:
    """Check that `choice: expert` has capacity factors, and no options that need `choice: token`."""
    if router.choice == "token":
        return
    for name in ("factor", "eval_factor"):
        if getattr(capacity, name) is None:
            key = f"moe.capacity.{name}"
            yield (
                key,
                f"{key} (null) must be set with moe.router.choice: expert, as it says how many tokens an expert takes",
            )
    idle = {
        "moe.router.normalize_weights": (router.normalize_weights, False),
        "moe.router.num_groups": (router.num_groups, 1),
        "moe.router.force_balanced": (router.force_balanced, False),
        "moe.balance.bias_update_rate": (balance.bias_update_rate, 0.0),
        "moe.capacity.target_drop_percent": (capacity.target_drop_percent, None),
    }
    for key, (value, default) in idle.items():
        if value != default:
            shown = "null" if default is None else str(default).lower()
            yield key, f"{key} ({str(value).lower()}) has no meaning with moe.router.choice: expert; set it to {shown}"


def group_problems(num_experts: int, top_k: int, router: Router) -> Iterator[Problem]:
    """Check group-limited routing, which is off with one group."""
    if num_experts % router.num_groups:
        nearest = nearest_of(router.num_groups, divisors_of(num_experts))
        yield (
            "moe.router.num_groups",
            f"moe.router.num_groups ({router.num_groups}) must divide moe.num_experts ({num_experts}); "
            f"nearest: {nearest}",
        )
        return
    size = num_experts // router.num_groups
    within = f"{router.top_k_groups} * {num_experts} / {router.num_groups} = {router.top_k_groups * size}"
    if router.top_k_groups > router.num_groups:
        yield (
            "moe.router.top_k_groups",
            f"moe.router.top_k_groups ({router.top_k_groups}) must be at most moe.router.num_groups "
            f"({router.num_groups})",
        )
    elif router.num_groups > 1 and top_k > router.top_k_groups * size:
        yield (
            "moe.router.top_k_groups",
            f"moe.top_k ({top_k}) must fit into the moe.router.top_k_groups that a token may use ({within} "
            f"experts); raise moe.router.top_k_groups to {-(-top_k // size)}",
        )
    if router.num_groups > 1 and size < (least := LEAST_IN_GROUP.get(router.group_score, 1)):
        yield (
            "moe.router.group_score",
            f"moe.router.group_score ({router.group_score}) needs {least} experts in a group, and "
            f"moe.router.num_groups ({router.num_groups}) leaves {size}; set moe.router.group_score: max",
        )


def capacity_problems(capacity: Capacity) -> Iterator[Problem]:
    """Check that a moving factor has a start and a limit, and that dropped weight can be spread."""
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
