"""The MoE layer as loops over tokens and experts, in float64: slow, obvious, sharing nothing with `dsmoe.moe`.

Tensors are float64 and everything is differentiable, so that autograd gives the gradients to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch

Expert = Callable[[torch.Tensor], torch.Tensor]
"""Maps one token, [D], to [D]."""


@dataclass(frozen=True)
class Settings:
    """How to route, balance and drop.

    `bias` is added to the scores that choose. `chances` has a random number for each (token, choice), token by token:
    under drop policy `random` the higher stay. `sequences` is what the balancing loss is averaged over; `load_share`,
    where given, stands for f in it. Under `choice` `expert` each expert takes its `capacity` best tokens.
    """

    top_k: int
    capacity: int
    drop_policy: str = "probability"
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "top2_sum"
    bias: Sequence[float] | None = None
    force_balanced: bool = False
    renormalize_dropped: bool = False
    chances: Sequence[float] | None = None
    sequences: int = 1
    load_share: Sequence[float] | None = None
    choice: str = "token"


@dataclass(frozen=True)
class Expected:
    """What the layer should return and count.

    `closest_call` is the smallest relative difference that decided which expert is chosen or (exact ties apart) which
    assignment is dropped: below fp32's resolution, a float32 layer may rightly decide otherwise.
    """

    output: torch.Tensor
    aux_loss: torch.Tensor
    z_loss: torch.Tensor
    assigned: list[int]
    kept: list[int]
    weight: float
    dropped_weight: float
    square_logit: float
    closest_call: float


@dataclass
class Token:
    """One token that is not masked: its logits and scores, and its chosen experts with their weights."""

    index: int
    logits: list[torch.Tensor]
    scores: list[torch.Tensor]
    chosen: list[int] = field(default_factory=list)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)


def capacity_of(num_tokens: int, top_k: int, num_experts: int, factor: float | None, minimum: int) -> int:
    if factor is None:
        return num_tokens
    return min(num_tokens, max(minimum, math.ceil(Fraction(num_tokens * top_k, num_experts) * Fraction(factor))))


def run_reference(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Sequence[Expert],
    settings: Settings,
    used: Sequence[bool] | None = None,
    dense: Expert | None = None,
    coefficient: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Expected:
    """Send the tokens of [T, D] `x` one by one to the experts, whose router has weights [E, D].

    Every one that is not masked passes `dense` as well; its output is added, or where there is a `coefficient` ([2, D]
    and [2]) mixed in.
    """
    calls = [math.inf]
    tokens = []
    for index in range(len(x)):
        if used is None or used[index]:
            token = score(index, [torch.dot(x[index], row) for row in router], settings)
            if settings.choice == "token":
                choose(token, len(tokens), settings, calls)
            tokens.append(token)
    if settings.choice == "expert":
        let_experts_choose(tokens, len(experts), settings, calls)
    for token in tokens:
        weigh(token, settings)
    kept = [drop(expert, tokens, settings, calls) for expert in range(len(experts))]

    output = [0.0 * row for row in x]
    dropped_weight = 0.0
    for token in tokens:
        stays = [expert for expert in token.chosen if token.index in kept[expert]]
        dropped_weight += sum(token.weights[e].item() for e in token.chosen if e not in stays)
        factor: torch.Tensor | float = 1.0
        if settings.renormalize_dropped and stays:
            factor = total(token.weights.values()) / total(token.weights[e] for e in stays)
        for expert in stays:
            output[token.index] = output[token.index] + factor * token.weights[expert] * experts[expert](x[token.index])
        if dense is not None:
            of_experts, of_dense = 1.0, 1.0
            if coefficient is not None:
                weight, bias = coefficient
                first, second = ((torch.dot(weight[i], x[token.index]) + bias[i]).exp() for i in range(2))
                of_experts, of_dense = first / (first + second), second / (first + second)
            output[token.index] = of_experts * output[token.index] + of_dense * dense(x[token.index])

    num_tokens = max(len(tokens), 1)
    return Expected(
        output=torch.stack(output),
        aux_loss=balancing_loss(tokens, len(x), len(experts), settings),
        z_loss=total(total(logit.exp() for logit in token.logits).log() ** 2 for token in tokens) / num_tokens,
        assigned=[sum(expert in token.chosen for token in tokens) for expert in range(len(experts))],
        kept=[len(indices) for indices in kept],
        weight=sum(weight.item() for token in tokens for weight in token.weights.values()),
        dropped_weight=dropped_weight,
        square_logit=sum(sum(logit.item() ** 2 for logit in token.logits) / len(experts) for token in tokens),
        closest_call=min(calls),
    )


def total(values: object) -> torch.Tensor:
    """A differentiable sum, also of nothing."""
    return sum(values, start=torch.zeros((), dtype=torch.float64))  # type: ignore[call-overload]


def score(index: int, logits: list[torch.Tensor], settings: Settings) -> Token:
    if settings.score == "sigmoid":
        return Token(index, logits, [1 / (1 + (-logit).exp()) for logit in logits])
    assert settings.score == "softmax", f"no formula of {settings.score}"
    exponentials = [logit.exp() for logit in logits]
    return Token(index, logits, [exponential / total(exponentials) for exponential in exponentials])


def choose(token: Token, turn: int, settings: Settings, calls: list[float]) -> None:
    """Fill `chosen`; `turn` counts the tokens that are not masked."""
    num_experts = len(token.scores)
    if settings.force_balanced:
        token.chosen = [(turn * settings.top_k + choice) % num_experts for choice in range(settings.top_k)]
        return
    bias = settings.bias or [0.0] * num_experts
    preference = [score.item() + added for score, added in zip(token.scores, bias, strict=True)]
    size = num_experts // settings.num_groups
    groups = [list(range(first, first + size)) for first in range(0, num_experts, size)]
    best_of_group = 1 if settings.group_score == "max" else 2
    worth = [sum(sorted((preference[e] for e in group), reverse=True)[:best_of_group]) for group in groups]
    best_groups = best(worth, settings.top_k_groups, calls) if settings.num_groups > 1 else [0]
    open_experts = [expert for group in best_groups for expert in groups[group]]
    token.chosen = [open_experts[i] for i in best([preference[e] for e in open_experts], settings.top_k, calls)]
    if settings.drop_policy == "random":  # the choices' order says which random number is whose
        chosen = [preference[e] for e in token.chosen]
        calls += [gap(higher, lower) for higher, lower in pairwise(chosen)]


def let_experts_choose(tokens: list[Token], num_experts: int, settings: Settings, calls: list[float]) -> None:
    """Fill `chosen` of all tokens: every expert takes the tokens that score it highest, the first among equals."""
    for expert in range(num_experts):
        close: list[float] = []
        for index in best([token.scores[expert].item() for token in tokens], settings.capacity, close):
            tokens[index].chosen.append(expert)
        calls += [call for call in close if call > 0]  # exact ties are no matter of rounding


def best(values: list[float], count: int, calls: list[float]) -> list[int]:
    """The indices of the `count` highest."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if count < len(order):
        calls.append(gap(values[order[count - 1]], values[order[count]]))
    return order[:count]


def gap(higher: float, lower: float) -> float:
    """The relative difference; where a bias makes a preference negative, the absolute one: sums of it can cancel."""
    return (higher - lower) / (higher if lower > 0 else 1.0)


def weigh(token: Token, settings: Settings) -> None:
    divisor = total(token.scores[e] for e in token.chosen) if settings.normalize else 1.0
    token.weights = {expert: settings.scale * token.scores[expert] / divisor for expert in token.chosen}


def drop(expert: int, tokens: list[Token], settings: Settings, calls: list[float]) -> set[int]:
    """The indices of the tokens that the expert keeps."""
    queue = [token for token in tokens if expert in token.chosen]

    def rank(token: Token) -> float:
        if settings.drop_policy == "position":
            return 0.0
        if settings.drop_policy == "probability":
            return token.weights[expert].item()
        assert settings.chances is not None
        return settings.chances[token.index * settings.top_k + token.chosen.index(expert)]

    queue.sort(key=lambda token: -rank(token))  # Python's sort is stable: ties stay in sequence order
    ranks = [rank(token) for token in queue]
    if settings.capacity < len(queue) and ranks[settings.capacity - 1] != ranks[settings.capacity]:
        calls.append(1 - ranks[settings.capacity] / ranks[settings.capacity - 1])
    return {token.index for token in queue[: settings.capacity]}


def balancing_loss(tokens: list[Token], length: int, num_experts: int, settings: Settings) -> torch.Tensor:
    """E * sum of f_e * P_e, averaged over the sequences in which some token is not masked."""
    size = max(length // settings.sequences, 1)
    losses = []
    for first in range(0, length, size):
        inside = [token for token in tokens if first <= token.index < first + size]
        if not inside:
            continue
        for_each = []
        for expert in range(num_experts):
            choices = sum(len(token.chosen) for token in inside)  # 0 where experts chose tokens of other sequences only
            share = sum(expert in token.chosen for token in inside) / max(choices, 1)
            if settings.load_share is not None:
                share = settings.load_share[expert]
            mean = total(token.scores[expert] / total(token.scores) for token in inside) / len(inside)
            for_each.append(share * mean)
        losses.append(num_experts * total(for_each))
    return total(losses) / max(len(losses), 1)


def swiglu_expert(gate_up: torch.Tensor, down: torch.Tensor) -> Expert:
    """One expert of stacked weights: [2I, D] gate over up, [D, I] down."""
    width = down.shape[1]

    def expert(token: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[:width] @ token, gate_up[width:] @ token
        return down @ (gate / (1 + (-gate).exp()) * up)

    return expert
