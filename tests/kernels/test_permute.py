"""The counting sort against torch's stable sort."""

from __future__ import annotations

import random

import pytest
import torch

from dsmoe.kernels.permute import count_by_expert, sort_by_expert
from tests.moe import DEVICE


def drawn(seed: int) -> tuple[int, int, int, float, float, int]:
    """Some sizes; every second time all experts are used and no token is masked."""
    draw = random.Random(seed)
    used, masked = (1.0, 0.0) if seed % 2 else (draw.random(), draw.random())
    return draw.randint(0, 300), draw.randint(1, 4), draw.randint(1, 70), used, masked, seed


# On a GPU each compiles two kernels, at half a second each.
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "used", "masked", "seed"),
    [
        (0, 1, 1, 1.0, 0.0, 0),
        (128, 2, 1, 1.0, 0.0, 0),
        (129, 1, 7, 1.0, 1.0, 0),
        *map(drawn, range(10 if DEVICE == "cuda" else 40)),
    ],
)
def test_sorted_as_torch_does(
    num_tokens: int, top_k: int, num_experts: int, used: float, masked: float, seed: int
) -> None:
    """Experts from few of all (`used`), and tokens of which a share is `masked`."""
    generator = torch.Generator().manual_seed(seed)
    highest = max(round(used * num_experts), 1)
    experts_TK = torch.randint(0, highest, (num_tokens, top_k), generator=generator)
    experts_TK[torch.rand(num_tokens, generator=generator) < masked] = num_experts
    flat_A = experts_TK.flatten()
    expected_A = flat_A.argsort(stable=True)
    counts = torch.bincount(flat_A, minlength=num_experts + 1)
    first = counts.cumsum(0) - counts

    counts_E, order_A, expert_A, place_A = (
        tensor.cpu() for tensor in sort_by_expert(experts_TK.to(DEVICE), num_experts)
    )

    assert torch.equal(order_A, expected_A)
    assert torch.equal(expert_A, flat_A[expected_A])
    assert torch.equal(place_A, torch.arange(flat_A.numel()) - first[expert_A])
    assert torch.equal(counts_E, counts[:num_experts])
    assert torch.equal(count_by_expert(experts_TK.to(DEVICE), num_experts).cpu(), counts_E)
