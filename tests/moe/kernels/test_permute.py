"""The counting sort against torch's stable sort."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsmoe.moe.kernels.permute import count_by_expert, sort_by_expert
from tests.moe import DEVICE


# Each example compiles two kernels on a GPU, at half a second each.
@settings(max_examples=12 if DEVICE == "cuda" else 40, deadline=None)
@given(
    num_tokens=st.integers(0, 300),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 70),
    used=st.floats(0, 1),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@example(num_tokens=0, top_k=1, num_experts=1, used=1.0, masked=0.0, seed=0)
@example(num_tokens=128, top_k=2, num_experts=1, used=1.0, masked=0.0, seed=0)
@example(num_tokens=129, top_k=1, num_experts=7, used=1.0, masked=1.0, seed=0)
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
