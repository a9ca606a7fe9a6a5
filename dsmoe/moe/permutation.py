"""Rows sorted by expert: which source row and weight each one takes, and how rows are summed back.

Gathering and summing are each other's gradients. Both are written as gathers, so that they are exact and repeatable:
no atomic adds on a GPU, no scatter-add on a CPU.

Shape suffixes: see `dsmoe.moe.dispatch`.
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
    """Which row each choice of each source row has in a buffer of N rows, and back.

    `row_SK` is N for a choice that has no row. `assignment_N` is the choice (source * K + k) of each row, S * K for a
    row without one. `complete` says that neither occurs. Where they do, `bags` has for a CPU the rows that there are,
    those of source 0 first [N], and where each source's begin in that list [S + 1]; what is over in the list is row 0,
    in one bag more.
    """

    row_SK: torch.Tensor
    assignment_N: torch.Tensor
    complete: bool
    bags: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, assignments: Assignments, first_E: torch.Tensor, num_rows: int) -> RowMap:
        """Give each kept assignment the row `first_E[expert] + place` of a buffer of `num_rows`."""
        order_A, expert_A = assignments.order_A, assignments.expert_A
        num_assignments = order_A.numel()
        first_E1 = torch.cat([first_E, first_E.new_zeros(1)])
        row_A = first_E1[expert_A] + assignments.place_A
        if not assignments.complete:
            row_A = torch.where(assignments.kept_A, row_A, num_rows)
        # A dropless buffer holds every assignment; one with a capacity may have rows over, or choices without a row.
        complete = assignments.complete and num_rows == num_assignments
        return cls.placed(order_A, row_A, assignments.num_choices, num_rows, complete)

    @classmethod
    def placed(
        cls, order_A: torch.Tensor, row_A: torch.Tensor, num_choices: int, num_rows: int, complete: bool
    ) -> RowMap:
        """Give choice `order_A[a]` (source * K + k) the row `row_A[a]` of a buffer of `num_rows`, or none: N."""
        row_SK = torch.empty_like(row_A).scatter_(0, order_A, row_A).view(-1, num_choices)
        assignment_N = order_A.new_full((num_rows + 1,), order_A.numel()).scatter_(0, row_A, order_A)
        bags = None if complete or on_gpu(row_SK) else _bags(row_SK, num_rows)
        return cls(row_SK, assignment_N[:num_rows], complete, bags)

    @classmethod
    def permutation(cls, order_N: torch.Tensor, inverse_N: torch.Tensor) -> RowMap:
        """Row n is source row `order_N[n]`."""
        return cls(inverse_N[:, None], order_N, True)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.assignment_N.numel()

    def sources(self) -> torch.Tensor:
        """[N], the source row of each row, clamped to a valid one for a row without one."""
        num_sources, num_choices = self.row_SK.shape
        return (self.assignment_N // num_choices).clamp(max=max(num_sources - 1, 0))

    def gather(self, source_SD: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [N, D]; zero for a row without a source."""
        if on_gpu(source_SD):
            from dsmoe.kernels.bag_sum import bag_sum

            # A bag of one row each; S for a row without a source, which is no row of the source either.
            return bag_sum(source_SD.contiguous(), (self.assignment_N // self.row_SK.shape[1])[:, None])
        if source_SD.shape[0] == 0:
            return source_SD.new_zeros((self.num_rows, source_SD.shape[1]))
        rows_ND = source_SD.index_select(0, self.sources())
        if self.complete:
            return rows_ND
        return torch.where((self.assignment_N < self.row_SK.numel())[:, None], rows_ND, 0.0)

    def sum(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [S, D], the sum of each source row's rows, in fp32 at least; no row adds nothing."""
        if on_gpu(rows_ND):
            from dsmoe.kernels.bag_sum import bag_sum

            return bag_sum(rows_ND.contiguous(), self.row_SK)
        num_sources, num_choices = self.row_SK.shape
        if num_sources == 0 or rows_ND.shape[0] == 0:
            return rows_ND.new_zeros((num_sources, rows_ND.shape[1]))
        if self.bags is not None:
            rows_N, first_S1 = self.bags
            return F.embedding_bag(rows_N, rows_ND, first_S1, mode="sum")[:num_sources]
        if not self.complete:  # row N, which is none, adds nothing
            rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])
        if num_choices == 1:
            return rows_ND.index_select(0, self.row_SK[:, 0])
        return F.embedding_bag(self.row_SK, rows_ND, mode="sum")

    def gather_weights(self, weights_SK: torch.Tensor) -> torch.Tensor:
        """[S, K] -> [N]; zero for a row without a source."""
        flat = weights_SK.reshape(-1)
        if not self.complete:
            flat = torch.cat([flat, flat.new_zeros(1)])
        return flat.index_select(0, self.assignment_N)

    def sum_weights(self, weights_N: torch.Tensor) -> torch.Tensor:
        """[N] -> [S, K], the value of each choice's row; zero for a choice without one. Transposes `gather_weights`."""
        if not self.complete:
            weights_N = torch.cat([weights_N, weights_N.new_zeros(1)])
        return weights_N.index_select(0, self.row_SK.reshape(-1)).view(self.row_SK.shape)


def _bags(row_SK: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`RowMap.bags`, in static shapes."""
    row_A = row_SK.flatten()
    present_A = row_A < num_rows
    end_A = present_A.cumsum(0)
    place_A = torch.where(present_A, end_A - 1, num_rows)
    rows_N = row_A.new_zeros(num_rows + 1).scatter_(0, place_A, row_A)[:num_rows]
    end_S = end_A.view(row_SK.shape)[:, -1]
    return rows_N, torch.cat([end_S.new_zeros(1), end_S])


def gather_rows(source_SD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.gather` with a gradient."""
    return _Gather.apply(source_SD, row_map)


def sum_rows(rows_ND: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.sum` with a gradient."""
    return _Sum.apply(rows_ND, row_map)


def gather_weights(weights_SK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """`RowMap.gather_weights` with a gradient."""
    return _GatherWeights.apply(weights_SK, row_map)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_SD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return row_map.gather(source_SD)

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
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.row_map.gather(grad_SD), None


class _GatherWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_SK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return row_map.gather_weights(weights_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.row_map.sum_weights(grad_N), None
