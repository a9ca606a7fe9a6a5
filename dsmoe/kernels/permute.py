"""A stable sort of the assignments by expert, without comparing or moving them more than once.

Counting sort: a histogram per block of assignments, one scan over (expert, block), and each assignment's rank among
those of its block. Twins: `count_experts` in `dsmoe.moe.balance` and the order of `dsmoe.moe.capacity.limit`.

Example: experts 1 0 1 | 1 0 2 in two blocks of three, E = 3.

    histograms    block 0 has [1, 2, 0], block 1 has [1, 1, 1]
    starts        expert 0: 0 1, expert 1: 2 4, expert 2: 5 5     the scan over (expert, block)
    row           2 0 3 | 4 1 5                                   start of (expert, block) + rank in the block

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsmoe.kernels.blocks import SIZES


def count_by_expert(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the entries (int64, 0 to E) that name each expert below E: [E] int64."""
    return _counts(_starts(experts, num_experts), num_experts)


def sort_by_expert(
    experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort assignments by expert, those of one expert in their present order.

    Args:
        experts: int64 of any shape, 0 to E - 1, or E for a masked assignment, which sorts last.
        num_experts: E.

    Returns:
        int64: the assignments of each expert [E]; and in sorted order, [A] each: the assignment, its expert, and its
        place within the expert.
    """
    starts = _starts(experts, num_experts)
    order_A, expert_A, place_A = (torch.empty_like(experts.view(-1)) for _ in range(3))
    num_blocks, block, num_warps = _blocks(experts)
    tensors = (experts, starts, order_A, expert_A, place_A)
    _place[(num_blocks,)](*tensors, experts.numel(), num_blocks, num_experts, block, num_warps=num_warps)
    return _counts(starts, num_experts), order_A, expert_A, place_A


def _blocks(experts: torch.Tensor) -> tuple[int, int, int]:
    """Return the number of blocks, the assignments of a block, and its warps."""
    block, num_warps = SIZES["permute"]["block"], SIZES["permute"]["warps"]
    return max(triton.cdiv(experts.numel(), block), 1), block, num_warps


def _starts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the begin of each block's assignments to each expert in sorted order, [(E + 1) * blocks + 1] int32.

    The assignments that fill up the last block count as masked ones, so that they stand behind all others.
    """
    num_blocks, block, num_warps = _blocks(experts)
    # int32: fewer than 2^31 assignments. One entry more, for the 0 that the scan starts with.
    counts = experts.new_empty((num_experts + 1) * num_blocks + 1, dtype=torch.int32)
    bins = triton.next_power_of_2(num_experts + 1)
    sizes = (experts.numel(), num_blocks, num_experts, bins, block)
    _histogram[(num_blocks,)](experts, counts, *sizes, num_warps=num_warps)
    # By expert first and block second, so that one scan gives every block its begin within every expert.
    return counts.cumsum(0, dtype=torch.int32)


def _counts(starts: torch.Tensor, num_experts: int) -> torch.Tensor:
    # Every `num_blocks`-th start is where an expert begins; the last of them is where the masked ones begin.
    num_blocks = starts.numel() // (num_experts + 1)
    return starts[::num_blocks].diff()[:num_experts].long()


# Both numbers follow the number of tokens: specialised, they would compile again whenever it changes.
@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def _histogram(
    experts,
    counts,
    num_assignments,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    assignment = block * BLOCK + tl.arange(0, BLOCK)
    # Lanes behind the last assignment count as masked, and so come last.
    expert = tl.load(experts + assignment, mask=assignment < num_assignments, other=NUM_EXPERTS).to(tl.int32)
    bins = tl.arange(0, BINS)
    # One place further, with a 0 in front: the inclusive scan is then the starts.
    if block == 0:
        tl.store(counts, 0)
    tl.store(counts + 1 + bins * num_blocks + block, tl.histogram(expert, BINS), mask=bins <= NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def _place(
    experts,
    starts,
    orders,
    sorted_experts,
    places,
    num_assignments,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    assignment = block * BLOCK + within
    mask = assignment < num_assignments
    expert = tl.load(experts + assignment, mask=mask, other=NUM_EXPERTS).to(tl.int32)
    # Earlier in the block and of the same expert. Stable, and without atomics, whose order varies.
    earlier = (expert[:, None] == expert[None, :]) & (within[None, :] < within[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    # Where the block's assignments to the expert begin, plus the rank among them: no two have the same row.
    row = tl.load(starts + expert * num_blocks + block) + rank
    tl.store(orders + row, assignment.to(tl.int64), mask=mask)
    tl.store(sorted_experts + row, expert.to(tl.int64), mask=mask)
    # From the expert's begin in the first block: earlier blocks count.
    tl.store(places + row, (row - tl.load(starts + expert * num_blocks)).to(tl.int64), mask=mask)
