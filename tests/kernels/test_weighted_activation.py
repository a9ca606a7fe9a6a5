"""The activation's kernels against `Activation` in float64."""

from __future__ import annotations

import pytest
import torch

from dsmoe.kernels.weighted_activation import weighted_activation, weighted_activation_backward
from dsmoe.nn.activations import ACTIVATIONS
from tests.kernels import DTYPES, ROUNDING
from tests.moe import DEVICE

SHAPES = [(37, 40), (64, 8), (1, 1), (5, 300), (0, 16), (9, 256)]
"""N and I: blocks that are full, partly full, and several to a row."""


def inputs(name: str, num_rows: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    width = 2 * inner if ACTIVATIONS[name].gated else inner
    z_NZ = 3 * torch.randn(num_rows, width, generator=generator)
    grad_NI = torch.randn(num_rows, inner, generator=generator)
    weight_N = torch.rand(num_rows, generator=generator)
    return z_NZ.to(DEVICE, dtype), grad_NI.to(DEVICE, dtype), weight_N.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "inner"), SHAPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernels_are_their_twin(name: str, num_rows: int, inner: int, dtype: torch.dtype) -> None:
    z_NZ, grad_NI, weight_N = inputs(name, num_rows, inner, dtype)
    ends_L = torch.tensor([num_rows // 2, num_rows], dtype=torch.int32, device=DEVICE)
    wide_NZ, wide_weight_N1 = z_NZ.double(), weight_N.double()[:, None]
    expected_grad_z_NZ = torch.empty_like(wide_NZ)
    expected_NI, expected_grad_weight_N = ACTIVATIONS[name].backward(
        grad_NI.double(), wide_NZ, wide_weight_N1, expected_grad_z_NZ
    )

    hidden_NI = weighted_activation(z_NZ, weight_N, ends_L, ACTIVATIONS[name])
    again_NI, grad_z_NZ, grad_weight_N = weighted_activation_backward(
        grad_NI, z_NZ, weight_N, ends_L, ACTIVATIONS[name]
    )

    assert (hidden_NI.dtype, grad_z_NZ.dtype, grad_weight_N.dtype) == (dtype, dtype, torch.float32)
    assert torch.equal(hidden_NI, again_NI)
    # Absolutely, since 1 + erf and 1 - sigmoid cancel in the tails; relatively, the one rounding to the dtype.
    near = {"rtol": ROUNDING[dtype], "atol": 4e-6}
    torch.testing.assert_close(hidden_NI.double(), expected_NI, **near)
    torch.testing.assert_close(grad_z_NZ.double(), expected_grad_z_NZ, **near)
    # A sum of terms of both signs, in fp32 whatever the dtype.
    torch.testing.assert_close(grad_weight_N.double(), expected_grad_weight_N, rtol=1e-6, atol=1e-6 * inner**0.5 * 9)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("end", [0, 1, 50, 100])
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_rows_behind_the_last_expert_are_neither_read_nor_written(name: str, end: int) -> None:
    z_NZ, grad_NI, weight_N = inputs(name, 100, 24, torch.float32)
    ends_L = torch.tensor([0, end // 2, end], dtype=torch.int32, device=DEVICE)
    clean = [weighted_activation(z_NZ, weight_N, ends_L, ACTIVATIONS[name])]
    clean += weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, ACTIVATIONS[name])
    for tensor in (z_NZ, grad_NI, weight_N):
        tensor[end:] = torch.nan
    garbage = [weighted_activation(z_NZ, weight_N, ends_L, ACTIVATIONS[name])]
    garbage += weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, ACTIVATIONS[name])
    for before, after in zip(clean, garbage, strict=True):
        assert torch.equal(before[:end], after[:end])
        assert after[:end].isfinite().all()
        assert before[end:].isnan().all()


def test_far_tails_stay_finite() -> None:
    for name, activation in ACTIVATIONS.items():
        z_NZ = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0, -0.0]], device=DEVICE)
        grad_NI = torch.ones(1, 3 if activation.gated else 6, device=DEVICE)
        ends_L = torch.ones(1, dtype=torch.int32, device=DEVICE)
        weight_N = torch.ones(1, device=DEVICE)
        for result in weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, ACTIVATIONS[name]):
            assert result.isfinite().all()
