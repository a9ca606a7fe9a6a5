"""The MoE layer as loops over tokens and experts, in float64: slow, obvious, sharing nothing with `dsmoe.moe`.

Tensors are float64 and everything is differentiable, so that autograd gives the gradients to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

Expert = Callable[[torch.Tensor], torch.Tensor]
"""Maps one token, [D], to [D]."""


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
    closest_call: float


def capacity_of(num_tokens: int, top_k: int, num_experts: int, factor: float | None, minimum: int) -> int:
    if factor is None:
        return num_tokens
    return min(num_tokens, max(minimum, math.ceil(Fraction(num_tokens * top_k, num_experts) * Fraction(factor))))


def run_reference(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Sequence[Expert],
    *,
    top_k: int,
    normalize: bool,
    capacity: int,
    drop_policy: str = "probability",
    used: Sequence[bool] | None = None,
) -> Expected:
    """Send the tokens of [T, D] `x` one by one to the experts, whose router has weights [E, D]."""
    tokens = [t for t in range(len(x)) if used is None or used[t]]
    queues: list[list[tuple[torch.Tensor, int]]] = [[] for _ in experts]
    score_sums = [torch.zeros((), dtype=torch.float64) for _ in experts]
    square_logsumexps = torch.zeros((), dtype=torch.float64)
    calls = [math.inf]
    for token in tokens:
        exponentials = [torch.dot(x[token], row).exp() for row in router]
        total = torch.stack(exponentials).sum()
        scores = [exponential / total for exponential in exponentials]
        best = sorted(range(len(experts)), key=lambda e: -scores[e].item())
        if top_k < len(experts):
            calls.append(1 - scores[best[top_k]].item() / scores[best[top_k - 1]].item())
        best = best[:top_k]
        divisor = torch.stack([scores[e] for e in best]).sum() if normalize else 1.0
        for e in best:
            queues[e].append((scores[e] / divisor, token))
        score_sums = [old + score for old, score in zip(score_sums, scores, strict=True)]
        square_logsumexps = square_logsumexps + total.log() ** 2

    output = [0.0 * token for token in x]
    dropped_weight = 0.0
    for expert, queue in zip(experts, queues, strict=True):
        if drop_policy == "probability":
            queue.sort(key=lambda item: -item[0].item())  # Python's sort is stable: ties stay in sequence order
            ranked = [weight.item() for weight, _ in queue]
            if capacity < len(queue) and ranked[capacity - 1] != ranked[capacity]:
                calls.append(1 - ranked[capacity] / ranked[capacity - 1])
        for weight, token in queue[:capacity]:
            output[token] = output[token] + weight * expert(x[token])
        dropped_weight += sum(weight.item() for weight, _ in queue[capacity:])

    assigned = [len(queue) for queue in queues]
    shares = [count / max(sum(assigned), 1) for count in assigned]
    num_tokens = max(len(tokens), 1)
    aux_loss = len(experts) * sum(
        (share * score_sum / num_tokens for share, score_sum in zip(shares, score_sums, strict=True)),
        start=torch.zeros((), dtype=torch.float64),
    )
    return Expected(
        output=torch.stack(output),
        aux_loss=aux_loss,
        z_loss=square_logsumexps / num_tokens,
        assigned=assigned,
        kept=[min(count, capacity) for count in assigned],
        weight=sum(weight.item() for queue in queues for weight, _ in queue),
        dropped_weight=dropped_weight,
        closest_call=min(calls),
    )


def swiglu_expert(gate_up: torch.Tensor, down: torch.Tensor) -> Expert:
    """One expert of stacked weights: [2I, D] gate over up, [D, I] down."""
    width = down.shape[1]

    def expert(token: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[:width] @ token, gate_up[width:] @ token
        return down @ (gate / (1 + (-gate).exp()) * up)

    return expert
