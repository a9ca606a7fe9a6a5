"""The experts' feed-forward as one autograd function: gather, two grouped products, activation, weighted sum.

Plain autograd over the same steps would keep the gathered rows, the activation and every expert's output. This
function keeps the source rows, integers and, unless `recompute` is set, the pre-activation z; the rest is computed
again in the backward pass (the formulation of SonicMoE, arXiv 2512.14080, and of Liger-Kernel). The router weight is
multiplied into the activation, so that its gradient is <dA, act(z)> and no output is needed for it.

Two implementations with the same numbers, of which `expert_ffn` takes the faster for the device: `_Grouped` runs each
step over all rows at once through `grouped_mm` (CUDA); `_Looped` runs all steps over one expert's rows at a time,
through buffers that stay in the cache (CPU). On CUDA nothing is read on the host in bf16 from compute capability 9.0
on; in fp32 and on older devices torch's grouped product is a loop that reads the end of each group.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsmoe.moe.permutation import RowMap
from dsmoe.nn.activations import Activation


@dataclass(frozen=True)
class ExpertRows:
    """The rows of each expert, and how to compute them.

    Attributes:
        row_map: sorts the choices by expert.
        ends_L: int32, the end of each expert's rows; rows behind the last are not computed.
        activation: an entry of `dsmoe.nn.activations.ACTIVATIONS`.
        recompute: compute z again in the backward pass, so that only the source rows are kept: two ninths more
            products with a gated activation, a sixth with others.
    """

    row_map: RowMap
    ends_L: torch.Tensor
    activation: Activation
    recompute: bool = False


def expert_ffn(
    source_UD: torch.Tensor,
    weights_UK: torch.Tensor,
    up_LZD: torch.Tensor,
    down_LDI: torch.Tensor,
    rows: ExpertRows,
) -> torch.Tensor:
    """Return sum_k weight_k * down_e(act(up_e(x))) for each source row x and the expert e of its k-th choice: [U, D].

    Args:
        source_UD: the source rows.
        weights_UK: router weights, fp32.
        up_LZD: first weights of the L experts.
        down_LDI: second weights.
        rows: the rows of each expert, and how to compute them.
    """
    implementation = _Looped if source_UD.device.type == "cpu" else _Grouped
    return implementation.apply(source_UD, weights_UK, up_LZD, down_LDI, rows)


@torch.compiler.assume_constant_result
def runs_in_groups(device: str) -> bool:
    """Return whether `expert_ffn` reads nothing on the host on this type of device."""
    return device != "cpu" or _Looped is _Grouped  # set so by tests that run a GPU's implementation on a CPU


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source_UD: torch.Tensor,
        weights_UK: torch.Tensor,
        up_LZD: torch.Tensor,
        down_LDI: torch.Tensor,
        rows: ExpertRows,
    ) -> torch.Tensor:
        row_map = rows.row_map
        # Rows behind the last end are undefined from here on: no choice has one of them, so no sum reads them.
        z_NZ = F.grouped_mm(row_map.gather(source_UD), up_LZD.transpose(-2, -1), offs=rows.ends_L)
        # The weight enters before `down`, which is linear: its outputs are weighted already.
        hidden_NI = rows.activation.weighted(z_NZ, row_map.gather_weights(weights_UK), rows.ends_L)
        out_ND = F.grouped_mm(hidden_NI, down_LDI.transpose(-2, -1), offs=rows.ends_L)
        # The source rows, of which the gathered ones are K copies; neither the activation nor any output.
        ctx.save_for_backward(source_UD, weights_UK, up_LZD, down_LDI, None if rows.recompute else z_NZ)
        ctx.rows = rows
        return row_map.sum(out_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_UD, weights_UK, up_LZD, down_LDI, z_NZ = ctx.saved_tensors
        rows: ExpertRows = ctx.rows
        row_map, ends_L = rows.row_map, rows.ends_L
        # Gathers and the activation are computed again rather than kept: they cost little beside the products.
        if z_NZ is None:
            z_NZ = F.grouped_mm(row_map.gather(source_UD), up_LZD.transpose(-2, -1), offs=ends_L)
        weight_N = row_map.gather_weights(weights_UK)
        # Each choice's output is added with factor 1, so its gradient is that of the source row.
        grad_ND = row_map.gather(grad_UD)
        grad_hidden_NI = F.grouped_mm(grad_ND, down_LDI, offs=ends_L)
        # In one pass over z: its gradient, and the weighted activation again, which down's gradient needs.
        hidden_NI, grad_z_NZ, grad_weight_N = rows.activation.weighted_backward(grad_hidden_NI, z_NZ, weight_N, ends_L)
        grad_up_LZD = grad_down_LDI = None
        if ctx.needs_input_grad[3]:
            # Of two operands without L `offs` cuts the dimension that is summed over: a matrix per expert.
            grad_down_LDI = F.grouped_mm(grad_ND.t(), hidden_NI, offs=ends_L)
        if ctx.needs_input_grad[2]:
            # Gathered where it is needed, so that the rows are alive during this product alone.
            grad_up_LZD = F.grouped_mm(grad_z_NZ.t(), row_map.gather(source_UD), offs=ends_L)
        # The transpose of the gather: the gradients of a source row's choices are added up.
        grad_source_UD = row_map.sum(F.grouped_mm(grad_z_NZ, up_LZD, offs=ends_L))
        grad_weights_UK = row_map.sum_weights(grad_weight_N.to(weights_UK.dtype))
        return grad_source_UD, grad_weights_UK, grad_up_LZD, grad_down_LDI, None


class _Looped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source_UD: torch.Tensor,
        weights_UK: torch.Tensor,
        up_LZD: torch.Tensor,
        down_LDI: torch.Tensor,
        rows: ExpertRows,
    ) -> torch.Tensor:
        row_map, spans = rows.row_map, _spans(rows.ends_L)
        most = max(len(span) for span in spans)
        # A z that is not kept stands in the same buffer for every expert.
        z_NZ = source_UD.new_empty(most if rows.recompute else row_map.num_rows, up_LZD.shape[1])
        # A scratch buffer, since the sum at the end is new memory: nothing of this one outlives the call.
        out_ND = _scratch(source_UD, row_map.num_rows, source_UD.shape[1])
        # One expert's gathered rows at a time, in a buffer that stays in the cache from one expert to the next.
        rows_JD = source_UD.new_empty(most, source_UD.shape[1])
        source_N = row_map.sources()
        # In the rows' dtype, for the multiplication in place below.
        weight_N1 = row_map.gather_weights(weights_UK)[:, None].to(source_UD.dtype)
        for expert, span in enumerate(spans):
            if not span:
                continue
            gathered, part = rows_JD[: len(span)], slice(span.start, span.stop)
            # A span is a range of N; without `recompute` the z of all spans are kept, one behind the other.
            z = z_NZ[: len(span)] if rows.recompute else z_NZ[part]
            torch.index_select(source_UD, 0, source_N[part], out=gathered)
            torch.mm(gathered, up_LZD[expert].t(), out=z)
            hidden = rows.activation.forward(z).mul_(weight_N1[part])
            torch.mm(hidden, down_LDI[expert].t(), out=out_ND[part])
        ctx.save_for_backward(source_UD, weights_UK, up_LZD, down_LDI, None if rows.recompute else z_NZ)
        ctx.rows, ctx.spans = rows, spans
        return row_map.sum(out_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_UD, weights_UK, up_LZD, down_LDI, z_NZ = ctx.saved_tensors
        row_map: RowMap = ctx.rows.row_map
        most, width = max(len(span) for span in ctx.spans), up_LZD.shape[1]
        rows_JD, grad_rows_JD = (source_UD.new_empty(most, source_UD.shape[1]) for _ in range(2))
        z_JZ, grad_z_JZ = (source_UD.new_empty(most, width) for _ in range(2))
        grad_hidden_JI = source_UD.new_empty(most, down_LDI.shape[2])
        # May be the forward pass's buffer, whose results were summed into new memory.
        grad_source_ND = _scratch(source_UD, row_map.num_rows, source_UD.shape[1])
        # Weights that are frozen cost nothing.
        grad_up_LZD = torch.empty_like(up_LZD) if ctx.needs_input_grad[2] else None
        grad_down_LDI = torch.empty_like(down_LDI) if ctx.needs_input_grad[3] else None
        source_N = row_map.sources()
        weight_N1 = row_map.gather_weights(weights_UK)[:, None].to(source_UD.dtype)
        # Zeros: rows behind the last expert's end belong to no span.
        grad_weight_N = weights_UK.new_zeros(row_map.num_rows)
        for expert, span in enumerate(ctx.spans):
            if not span:
                # `empty_like` left them uninitialised.
                for grad in (grad_up_LZD, grad_down_LDI):
                    if grad is not None:
                        grad[expert].zero_()
                continue
            count, part = len(span), slice(span.start, span.stop)
            gathered, grad_rows, grad_z = rows_JD[:count], grad_rows_JD[:count], grad_z_JZ[:count]
            torch.index_select(source_UD, 0, source_N[part], out=gathered)
            torch.index_select(grad_UD, 0, source_N[part], out=grad_rows)
            z = torch.mm(gathered, up_LZD[expert].t(), out=z_JZ[:count]) if z_NZ is None else z_NZ[part]
            # `grad_rows` is unweighted: the weight is a part of `hidden`, and `activation.backward` has its gradient.
            grad_hidden = torch.mm(grad_rows, down_LDI[expert], out=grad_hidden_JI[:count])
            hidden, grad_weight_N[part] = ctx.rows.activation.backward(grad_hidden, z, weight_N1[part], grad_z)
            if grad_down_LDI is not None:
                torch.mm(grad_rows.t(), hidden, out=grad_down_LDI[expert])
            if grad_up_LZD is not None:
                torch.mm(grad_z.t(), gathered, out=grad_up_LZD[expert])
            torch.mm(grad_z, up_LZD[expert], out=grad_source_ND[part])
        grad_weights_UK = row_map.sum_weights(grad_weight_N)
        return row_map.sum(grad_source_ND), grad_weights_UK, grad_up_LZD, grad_down_LDI, None


_kept = threading.local()


def _scratch(like: torch.Tensor, num_rows: int, width: int) -> torch.Tensor:
    """Return a buffer for the time of one call; the thread's next call overwrites it.

    A CPU's allocator returns large buffers to the system, which hands them out again page by page, zeroed.
    """
    if type(like) is not torch.Tensor:  # traced: a kept buffer would leak out of the trace
        return like.new_empty(num_rows, width)
    size, buffer = num_rows * width, getattr(_kept, "buffer", None)
    # Grown and never shrunk while the dtype stays: after the first steps no call asks the system for memory.
    if buffer is None or buffer.dtype != like.dtype or buffer.numel() < size:
        # A tensor of inference mode could not be written to by a later training pass.
        with torch.inference_mode(False):
            buffer = _kept.buffer = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(num_rows, width)


def _spans(ends_L: torch.Tensor) -> list[range]:
    """Return each expert's rows; reads `ends_L` on the host."""
    ends = ends_L.tolist()
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]
