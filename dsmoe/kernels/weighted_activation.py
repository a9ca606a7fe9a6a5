"""The activation times the router weight, forward and backward in one pass over z each.

Twin: `dsmoe.nn.activations.Activation`. Rows behind the last expert's end are neither read nor written.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from dsmoe.kernels import Entry, kernel_code
from dsmoe.kernels.blocks import SIZES, Sizes


class Activation(Entry, Protocol):
    """The part of an entry of `dsmoe.nn.activations.ACTIVATIONS` that these kernels read."""

    @property
    def gated(self) -> bool:
        """True if z has two halves, gate and up."""


def weighted_activation(
    z_NZ: torch.Tensor, weight_N: torch.Tensor, ends_L: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """Return weight * act(z), or weight * act(gate) * up with a gated activation: [N, I] in z's dtype.

    Args:
        z_NZ: the pre-activation, bf16 or fp32.
        weight_N: router weights, fp32.
        ends_L: int32, the end of each expert's rows; from the last on the result is uninitialised.
        activation: an entry of `dsmoe.nn.activations.ACTIVATIONS`.

    Raises:
        NotImplementedError: the kernel has no code for the activation.
    """
    inner, code = _inner(z_NZ, activation), _code(activation)
    hidden_NI = z_NZ.new_empty(z_NZ.shape[0], inner)
    rows, columns, num_warps = _tile(inner, SIZES["activation_forward"])
    # For all N rows: how many of them belong to an expert is known on the device alone.
    grid = (triton.cdiv(z_NZ.shape[0], rows), triton.cdiv(inner, columns))
    tensors = (z_NZ, weight_N, ends_L, hidden_NI)
    _forward[grid](*tensors, ends_L.numel(), inner, code, activation.gated, rows, columns, num_warps=num_warps)
    return hidden_NI


def weighted_activation_backward(
    grad_NI: torch.Tensor, z_NZ: torch.Tensor, weight_N: torch.Tensor, ends_L: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result of `weighted_activation` once more, and its gradients, from the gradient of the result.

    Returns:
        The weighted activation [N, I], z's gradient [N, Z], and the weight's [N] in fp32; all uninitialised from the
        last expert's end on.
    """
    inner, code = _inner(z_NZ, activation), _code(activation)
    hidden_NI, grad_z_NZ, grad_weight_N = torch.empty_like(grad_NI), torch.empty_like(z_NZ), torch.empty_like(weight_N)
    rows, columns, num_warps = _tile(inner, SIZES["activation_backward"])
    tensors = (grad_NI, z_NZ, weight_N, ends_L, hidden_NI, grad_z_NZ, grad_weight_N)
    # No second dimension: a program has whole rows.
    grid = (triton.cdiv(z_NZ.shape[0], rows),)
    _backward[grid](*tensors, ends_L.numel(), inner, code, activation.gated, rows, columns, num_warps=num_warps)
    return hidden_NI, grad_z_NZ, grad_weight_N


def _inner(z_NZ: torch.Tensor, activation: Activation) -> int:
    return z_NZ.shape[1] // (2 if activation.gated else 1)


def _code(activation: Activation) -> str:
    return kernel_code(activation, "dsmoe.nn.activations.ACTIVATIONS", __name__)


def _tile(inner: int, sizes: Sizes) -> tuple[int, int, int]:
    """Return rows and columns of a tile, with no more columns than there are, and its warps."""
    columns = min(triton.next_power_of_2(inner), sizes["columns"])
    return max(sizes["tile"] // columns, 1), columns, sizes["warps"]


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    """act(x) and act'(x)."""
    if ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # the normal distribution and its density at x
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    else:
        tl.static_assert(False, f"this kernel has no branch for the activation {ACT}")


@triton.jit
def _forward(
    z,
    weight,
    ends,
    hidden,
    NUM_EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A row of z with a gate has the gate's INNER columns, then those of `up`.
    WIDTH: tl.constexpr = 2 * INNER if GATED else INNER
    end = tl.load(ends + NUM_EXPERTS - 1)
    # Behind the last expert's end: such programs cost a launch and one load.
    if tl.program_id(0) * ROWS >= end:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < end)[:, None] & (column < INNER)
    row_weight = tl.load(weight + row, mask=row < end, other=0.0)[:, None]
    # 64 bits from here on: N * Z may exceed 2^31.
    row = row.to(tl.int64)[:, None]
    gate = tl.load(z + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    act, _ = _value_and_slope(gate, ACT)
    if GATED:
        act *= tl.load(z + row * WIDTH + INNER + column, mask=mask, other=0.0).to(tl.float32)
    # fp32 until here: rounded once.
    tl.store(hidden + row * INNER + column, act * row_weight, mask=mask)


@triton.jit
def _backward(
    grad,
    z,
    weight,
    ends,
    hidden,
    grad_z,
    grad_weight,
    NUM_EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * INNER if GATED else INNER
    # For y = w * act(g) * u and its gradient d:
    #   dL/dg = d * w * u * act'(g)    dL/du = d * w * act(g)    dL/dw = sum over the columns of d * act(g) * u
    # and y itself, which the gradient of `down` needs and which the forward pass has not kept.
    end = tl.load(ends + NUM_EXPERTS - 1)
    if tl.program_id(0) * ROWS >= end:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < end
    row_weight = tl.load(weight + row, mask=row_mask, other=0.0)[:, None]
    # Added up column by column, and across the columns once, at the end.
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    long_row = row.to(tl.int64)[:, None]
    # One program sees a whole row, so that the weight's gradient needs no atomic add.
    for first in range(0, INNER, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = row_mask[:, None] & (column < INNER)
        z_place, inner_place = long_row * WIDTH + column, long_row * INNER + column
        gate = tl.load(z + z_place, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(grad + inner_place, mask=mask, other=0.0).to(tl.float32)
        act, slope = _value_and_slope(gate, ACT)
        weighted = upstream * row_weight
        value = act
        if GATED:
            up = tl.load(z + z_place + INNER, mask=mask, other=0.0).to(tl.float32)
            value = act * up
            tl.store(grad_z + z_place + INNER, weighted * act, mask=mask)
            # Now for the gate, whose slope has `up` as a factor.
            weighted *= up
        tl.store(grad_z + z_place, weighted * slope, mask=mask)
        tl.store(hidden + inner_place, value * row_weight, mask=mask)
        product += upstream * value
    tl.store(grad_weight + row, tl.sum(product, axis=1), mask=row_mask)
