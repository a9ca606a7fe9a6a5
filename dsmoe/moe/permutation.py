"""Rows sorted by expert: gather them from the source rows, and sum them back.

Gathering and summing are each other's gradients. Both are written as gathers, so that they are exact and repeatable:
no atomic adds on a GPU, no scatter-add on a CPU.

Example: T = 4 tokens of K = 2 choices, E = 4 experts that accept C = 1 each, into a buffer of N = 5 rows.

    experts_TK      [[0, 1], [0, 2], [1, 3], [2, 3]]     the second choice of an expert is dropped
    row_UK          [[0, 1], [5, 2], [5, 3], [5, 5]]     5 is N: no row
    assignment_N    [0, 1, 3, 5, 8]                      token * 2 + choice; 8 is U * K: row 4 stays empty
    gather          rows of tokens 0 0 1 2 -             a zero for row 4
    sum             token 0 = row 0 + row 1, token 1 = row 2, token 2 = row 3, token 3 = 0
    bags            rows [0, 1, 2, 3, 0], begins [0, 2, 3, 4, 4]

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsmoe.kernels import on_gpu
from dsmoe.moe.capacity import Assignments


@dataclass(frozen=True)
class RowMap:
    """The row of each choice of each source row in a buffer of N rows, and the reverse.

    Attributes:
        row_UK: the row of each choice; N for a choice without one.
        assignment_N: the choice (source * K + k) of each row; U * K for a row without one.
        complete: every choice has a row, and every row a choice.
        bags: for a CPU, unless complete: the rows that have a choice, those of source 0 first [N], and where each
            source's begin in that list [U + 1]. The list is filled up with row 0, which belongs to one bag more.
    """

    row_UK: torch.Tensor
    assignment_N: torch.Tensor
    complete: bool
    bags: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_assignments(cls, assignments: Assignments, first_E: torch.Tensor, num_rows: int) -> RowMap:
        """Give each kept assignment the row `first_E[expert] + place` of a buffer of `num_rows`."""
        order_A, expert_A = assignments.order_A, assignments.expert_A
        num_assignments = order_A.numel()
        # Masked assignments carry expert E, which needs an entry to be looked up.
        firsts = torch.cat([first_E, first_E.new_zeros(1)])
        row_A = firsts[expert_A] + assignments.place_A
        if not assignments.complete:
            row_A = torch.where(assignments.kept_A, row_A, num_rows)
        # A dropless buffer holds every assignment; one with a capacity may have rows over, or choices without a row.
        complete = assignments.complete and num_rows == num_assignments
        return cls.from_rows(order_A, row_A, assignments.num_choices, num_rows, complete)

    @classmethod
    def from_rows(
        cls, order_A: torch.Tensor, row_A: torch.Tensor, num_choices: int, num_rows: int, complete: bool
    ) -> RowMap:
        """Give choice `order_A[a]` (source * K + k) the row `row_A[a]` of a buffer of `num_rows`, or none: N."""
        # Both by scatters of integers to distinct places: exact on every device. All choices without a row write to
        # place N of the reverse, which is cut off.
        row_UK = torch.empty_like(row_A).scatter_(0, order_A, row_A).view(-1, num_choices)
        assignment_N = order_A.new_full((num_rows + 1,), order_A.numel()).scatter_(0, row_A, order_A)
        bags = None if complete or on_gpu(row_UK) else _bags(row_UK, num_rows)
        return cls(row_UK, assignment_N[:num_rows], complete, bags)

    @classmethod
    def permutation(cls, order_N: torch.Tensor, inverse_N: torch.Tensor) -> RowMap:
        """Make source row `order_N[n]` row n; `inverse_N` is the inverse permutation."""
        # One choice per source row, and none missing: no bags, no masks.
        return cls(inverse_N[:, None], order_N, True)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.assignment_N.numel()

    def sources(self) -> torch.Tensor:
        """Return the source row of each row [N]; any valid one for a row without a choice."""
        num_sources, num_choices = self.row_UK.shape
        # A row without a choice has U * K, and so the source U, one past the last.
        return (self.assignment_N // num_choices).clamp(max=max(num_sources - 1, 0))

    def gather(self, source_UD: torch.Tensor) -> torch.Tensor:
        """[U, D] -> [N, D]; zero for a row without a choice."""
        if on_gpu(source_UD):
            from dsmoe.kernels.bag_sum import bag_sum

            # Bags of one row. U * K // K is U for a row without a choice, which the kernel takes for no row.
            return bag_sum(source_UD.contiguous(), (self.assignment_N // self.row_UK.shape[1])[:, None])
        if source_UD.shape[0] == 0:
            return source_UD.new_zeros((self.num_rows, source_UD.shape[1]))
        rows_ND = source_UD.index_select(0, self.sources())
        if self.complete:
            return rows_ND
        # Not by a product: an infinite source row times 0 would be NaN.
        return torch.where((self.assignment_N < self.row_UK.numel())[:, None], rows_ND, 0.0)

    def sum(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [U, D], the sum of each source row's rows, in fp32 at least; no row adds nothing."""
        if on_gpu(rows_ND):
            from dsmoe.kernels.bag_sum import bag_sum

            return bag_sum(rows_ND.contiguous(), self.row_UK)
        num_sources, num_choices = self.row_UK.shape
        if num_sources == 0 or rows_ND.shape[0] == 0:
            return rows_ND.new_zeros((num_sources, rows_ND.shape[1]))
        if self.bags is not None:
            # The last bag, which is cut off, takes what fills up the list: its length is static.
            rows_N, firsts = self.bags
            return F.embedding_bag(rows_N, rows_ND, firsts, mode="sum")[:num_sources]
        # float64 on a GPU, which has no bags: gradients are checked in it.
        if not self.complete:  # row N, no row, is a row of zeros
            rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])
        if num_choices == 1:  # a copy: nothing to add
            return rows_ND.index_select(0, self.row_UK[:, 0])
        return F.embedding_bag(self.row_UK, rows_ND, mode="sum")

    def gather_weights(self, weights_UK: torch.Tensor) -> torch.Tensor:
        """[U, K] -> [N]; zero for a row without a choice."""
        flat = weights_UK.reshape(-1)
        if not self.complete:
            # A zero at U * K, which rows without a choice point to.
            flat = torch.cat([flat, flat.new_zeros(1)])
        return flat.index_select(0, self.assignment_N)

    def sum_weights(self, weights_N: torch.Tensor) -> torch.Tensor:
        """[N] -> [U, K]; zero for a choice without a row. The transpose of `gather_weights`."""
        if not self.complete:
            # A zero at N, which choices without a row point to.
            weights_N = torch.cat([weights_N, weights_N.new_zeros(1)])
        return weights_N.index_select(0, self.row_UK.reshape(-1)).view(self.row_UK.shape)


def _bags(row_UK: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `RowMap.bags`, in static shapes: compacting by a mask would read its size on the host."""
    row_A = row_UK.flatten()
    present_A = row_A < num_rows
    # The place of a present choice among all present ones, plus 1.
    end_A = present_A.cumsum(0)
    place_A = torch.where(present_A, end_A - 1, num_rows)  # choices without a row go behind the end, and are cut off
    # Rows are distinct, so at most N choices are present: the list always fits.
    rows_N = row_A.new_zeros(num_rows + 1).scatter_(0, place_A, row_A)[:num_rows]
    # A source's bag ends with its last choice, and begins where the one before it ends.
    end_U = end_A.view(row_UK.shape)[:, -1]
    return rows_N, torch.cat([end_U.new_zeros(1), end_U])


def gather_rows(source_UD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.gather` with a gradient."""
    return _Gather.apply(source_UD, row_map)


def sum_rows(rows_ND: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.sum` with a gradient."""
    return _Sum.apply(rows_ND, row_map)


def gather_weights(weights_UK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.gather_weights` with a gradient."""
    return _GatherWeights.apply(weights_UK, row_map)


# Functions of their own: autograd would form the gradient of a gather by adding atomically on a GPU, in another order
# each time. They keep the integers of the map for the backward pass, and neither rows nor weights.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_UD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return row_map.gather(source_UD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.row_map.sum(grad_ND), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return row_map.sum(rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.row_map.gather(grad_UD), None


class _GatherWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_UK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return row_map.gather_weights(weights_UK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.row_map.sum_weights(grad_N), None
