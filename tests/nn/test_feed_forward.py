"""The dense feed-forward: its formula and gradient in every activation."""

from __future__ import annotations

import pytest
import torch

from dsmoe.nn.activations import ACTIVATIONS
from dsmoe.nn.feed_forward import FeedForward
from tests.moe.test_grouped_ffn import FORMULAS, INNER


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(activation: str) -> None:
    torch.manual_seed(0)
    module = FeedForward(6, INNER, activation).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weights = [module.gate_up.weight, module.down.weight]
    expected = FORMULAS[activation](x @ weights[0].T) @ weights[1].T
    torch.testing.assert_close(module(x), expected)
    for mine, theirs in zip(
        torch.autograd.grad(module(x).square().sum(), [x, *weights]),
        torch.autograd.grad(expected.square().sum(), [x, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="swiglu, geglu, gelu, relu2, not 'tanh'"):
        FeedForward(8, 8, "tanh")
