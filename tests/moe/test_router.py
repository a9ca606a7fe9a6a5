"""Which of equal experts a token chooses."""

from __future__ import annotations

import pytest
import torch

from dsmoe.config import schema
from dsmoe.moe.router import Router, _largest


def test_the_first_of_equals_stands_first_in_the_order_of_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x_Tn = torch.randint(-3, 4, (200, 70), generator=generator) * 0.1
    x_Tn[0], x_Tn[1, ::2] = 0.0, -0.0
    x_Tn[2, 5:], x_Tn[3, 7], x_Tn[4] = -torch.inf, torch.inf, 1e-40
    for top_k in (1, 6, 70):
        expected = x_Tn.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(_largest(x_Tn, top_k), expected)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_k_groups": 2, "group_score": "max"}])
def test_equal_logits_choose_the_lowest_experts(groups: dict[str, int]) -> None:
    router = Router(8, 64, 3, schema.Router(**groups))
    torch.nn.init.zeros_(router.weight)
    assert router(torch.randn(5, 8)).experts_TK.tolist() == [[0, 1, 2]] * 5
