"""Sums of a few rows each: combine, the gradient of gather, and with bags of one gather itself.

Twins: `RowMap.sum` and `RowMap.gather` in `dsmoe.moe.permutation`.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsmoe.kernels.blocks import SIZES


def bag_sum(rows_ND: torch.Tensor, row_UK: torch.Tensor) -> torch.Tensor:
    """Return out[u] = sum over k of rows[row[u, k]], in fp32 and in the order of k: [U, D] in the rows' dtype.

    Args:
        rows_ND: bf16 or fp32.
        row_UK: int64; N and above is no row and adds nothing.
    """
    num_bags, bag_size = row_UK.shape
    num_rows, width = rows_ND.shape
    out_UD = rows_ND.new_empty(num_bags, width)
    sizes = SIZES["bag_sum"]
    # A program has one bag and some columns: all its loads of a row are side by side.
    columns = min(triton.next_power_of_2(width), sizes["columns"])
    grid = (num_bags, triton.cdiv(width, columns))
    num_warps = max(columns // sizes["columns_per_warp"], 1)
    unroll = min(bag_size, sizes["unroll"])
    _bag_sum[grid](rows_ND, row_UK, out_UD, num_rows, bag_size, width, columns, unroll, num_warps=num_warps)
    return out_UD


# The number of rows changes from pass to pass: specialised, it would compile again.
@triton.jit(do_not_specialize=["num_rows"])
def _bag_sum(
    rows,
    index,
    out,
    num_rows,
    BAG: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # 64 bits: U * D may exceed 2^31. So may N * D, but indices are int64 already.
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # In fp32 and in the order of k: no atomics, so the sum has the same bits each time.
    total = tl.zeros([COLUMNS], tl.float32)
    # Unrolled, so that several rows are loaded at a time.
    for k in tl.range(0, BAG, loop_unroll_factor=UNROLL):
        row = tl.load(index + bag * BAG + k)
        # No row reads nothing and adds 0, so that bags of any length are one shape.
        mask = (row < num_rows) & (column < WIDTH)
        total += tl.load(rows + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + bag * WIDTH + column, total, mask=column < WIDTH)
