"""Steps 4 and 6, dispatch and combine: bring tokens to the experts that they chose, and the results home.

Three ways that share one row layout and differ only in what travels:

* `LocalDispatch`: one expert rank. Nothing travels; shapes are static and the host reads nothing.
* `PaddedDispatch`: full [E, C, D] buffers with equal splits. Static shapes, no host read; needs a capacity.
* `VariableDispatch`: only the kept rows. Exchanges the counts first and reads them on the host, once per layer.

Shape suffixes: see `dsmoe.moe.router`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from deepspeed import comm
from torch.autograd.function import once_differentiable

from dsmoe.moe.capacity import Assignments
from dsmoe.parallel.collectives import Exchange, Traffic, all_to_all
from dsmoe.parallel.groups import ExpertGroup


@dataclass(frozen=True)
class RowMap:
    """Which row each assignment has in a buffer of N rows, and back.

    `row_TK` is N for an assignment that has no row; `assignment_N` is A for a row that has no assignment.
    """

    row_TK: torch.Tensor
    assignment_N: torch.Tensor
    complete: bool


@dataclass(frozen=True)
class Dispatched:
    """Rows at the experts of this rank: `rows_ND` sorted by local expert, and where each expert's rows end.

    `ends_L` is int32 on the device. `counts_L` has the rows of each expert on the host, where the host knows them.
    `home` is what `combine` needs to find the way back.
    """

    rows_ND: torch.Tensor
    ends_L: torch.Tensor
    counts_L: list[int] | None
    home: Any


class Dispatch(Protocol):
    """What the layer needs of a way to exchange tokens."""

    traffic: Traffic

    def dispatch(self, x_TD: torch.Tensor, assignments: Assignments) -> Dispatched:
        """Bring [T, D] tokens to their experts."""

    def combine(self, rows_ND: torch.Tensor, dispatched: Dispatched, weights_TK: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows home and sum each token's, weighted, in fp32: [T, D] in the rows' dtype."""


@dataclass
class LocalDispatch:
    """All experts are on this rank: sort the rows, no exchange. Dropped rows stand behind the last expert's end."""

    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, assignments: Assignments) -> Dispatched:
        """See `Dispatch.dispatch`; N = A."""
        num_rows = assignments.order_A.numel()
        ends_L = assignments.kept_E.cumsum(0)
        row_map = _map_rows(assignments, ends_L - assignments.kept_E, num_rows)
        return Dispatched(_gather(x_TD, row_map), ends_L.int(), None, row_map)

    def combine(self, rows_ND: torch.Tensor, dispatched: Dispatched, weights_TK: torch.Tensor) -> torch.Tensor:
        """See `Dispatch.combine`."""
        return _Combine.apply(rows_ND, weights_TK, dispatched.home)


@dataclass
class PaddedDispatch:
    """Every rank sends every other exactly C rows for each of its experts; unused rows are zero."""

    group: ExpertGroup
    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, assignments: Assignments) -> Dispatched:
        """See `Dispatch.dispatch`; N = R * L * C = E * C."""
        capacity = assignments.capacity
        assert capacity is not None, "PaddedDispatch needs a capacity"
        num_experts, ranks = assignments.assigned_E.numel(), self.group.size
        per_rank = num_experts // ranks
        first_E = torch.arange(num_experts, device=x_TD.device) * capacity
        row_map = _map_rows(assignments, first_E, num_experts * capacity)
        sent_ND = _gather(x_TD, row_map)
        received_ND = all_to_all(sent_ND, Exchange(self.group, self.traffic))
        rows_ND = _swap_leading(received_ND, ranks, per_rank, capacity)
        ends_L = torch.arange(1, per_rank + 1, dtype=torch.int32, device=x_TD.device) * (ranks * capacity)
        return Dispatched(rows_ND, ends_L, [ranks * capacity] * per_rank, row_map)

    def combine(self, rows_ND: torch.Tensor, dispatched: Dispatched, weights_TK: torch.Tensor) -> torch.Tensor:
        """See `Dispatch.combine`."""
        per_rank = len(dispatched.ends_L)
        capacity = rows_ND.shape[0] // (per_rank * self.group.size)
        by_rank_ND = _swap_leading(rows_ND, per_rank, self.group.size, capacity)
        returned_ND = all_to_all(by_rank_ND, Exchange(self.group, self.traffic))
        return _Combine.apply(returned_ND, weights_TK, dispatched.home)


@dataclass
class VariableDispatch:
    """Only kept rows travel, as many as there are: dropless training, or a capacity without padding."""

    group: ExpertGroup
    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, assignments: Assignments) -> Dispatched:
        """See `Dispatch.dispatch`; N is what the ranks of the group send here."""
        send_RL, receive_RL = self._exchange_counts(assignments.kept_E)
        send_R, receive_R = [sum(row) for row in send_RL], [sum(row) for row in receive_RL]
        first_E = assignments.kept_E.cumsum(0) - assignments.kept_E
        row_map = _map_rows(assignments, first_E, sum(send_R))
        sent_ND = _gather(x_TD, row_map)
        exchange = Exchange(self.group, self.traffic, send_R, receive_R)
        received_ND = all_to_all(sent_ND, exchange)
        to_expert_N, to_source_N = _regroup(receive_RL, x_TD.device)
        counts_L = [sum(column) for column in zip(*receive_RL, strict=True)]
        ends_L = torch.tensor(counts_L, device=x_TD.device).cumsum(0).int()
        rows_ND = _Permute.apply(received_ND, to_expert_N, to_source_N)
        return Dispatched(rows_ND, ends_L, counts_L, (row_map, exchange, to_expert_N, to_source_N))

    def combine(self, rows_ND: torch.Tensor, dispatched: Dispatched, weights_TK: torch.Tensor) -> torch.Tensor:
        """See `Dispatch.combine`."""
        row_map, exchange, to_expert_N, to_source_N = dispatched.home
        rows_ND = _Permute.apply(rows_ND, to_source_N, to_expert_N)
        returned_ND = all_to_all(rows_ND, exchange.reversed())
        return _Combine.apply(returned_ND, weights_TK, row_map)

    def _exchange_counts(self, kept_E: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Rows for each (rank, local expert), sent and received, on the host: the one host read of this dispatch."""
        received_E = torch.empty_like(kept_E)
        comm.all_to_all_single(received_E, kept_E.contiguous(), group=self.group.handle)
        both = torch.stack([kept_E, received_E]).view(2, self.group.size, -1).tolist()
        return both[0], both[1]


def choose_dispatch(group: ExpertGroup, padded: bool) -> Dispatch:
    """The way to exchange tokens over `group`; `padded` where a capacity is set and static shapes are wanted."""
    if group.size == 1:
        return LocalDispatch()
    return PaddedDispatch(group) if padded else VariableDispatch(group)


def _map_rows(assignments: Assignments, first_E: torch.Tensor, num_rows: int) -> RowMap:
    """Give each kept assignment the row `first_E[expert] + place` of a buffer of `num_rows`."""
    order_A, expert_A = assignments.order_A, assignments.expert_A
    num_assignments = order_A.numel()
    first_E1 = torch.cat([first_E, first_E.new_zeros(1)])
    row_A = first_E1[expert_A] + assignments.place_A
    if not assignments.complete:
        row_A = torch.where(assignments.kept_A, row_A, num_rows)
    row_TK = torch.empty_like(row_A).scatter_(0, order_A, row_A).view(-1, assignments.num_choices)
    assignment_N = order_A.new_full((num_rows + 1,), num_assignments).scatter_(0, row_A, order_A)
    assignment_N[num_rows] = num_assignments
    return RowMap(row_TK, assignment_N[:num_rows], assignments.complete)


def _gather(x_TD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    return _Gather.apply(x_TD, row_map)


def _token_rows(x_TD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    """[N, D]: for each row its token, zero for a row without one."""
    num_choices = row_map.row_TK.shape[1]
    token_N = row_map.assignment_N // num_choices
    if row_map.complete:
        return x_TD.index_select(0, token_N)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros((token_N.numel(), x_TD.shape[1]))
    present_N = token_N < x_TD.shape[0]
    return x_TD.index_select(0, token_N.clamp(max=x_TD.shape[0] - 1)) * present_N[:, None]


def _choice_rows(rows_ND: torch.Tensor, row_map: RowMap, choice: int) -> torch.Tensor:
    """[T, D] fp32: for each token the row of its choice, zero where it was dropped or masked."""
    row_T = row_map.row_TK[:, choice]
    if row_map.complete:
        return rows_ND.index_select(0, row_T).float()
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros((row_T.numel(), rows_ND.shape[1]), dtype=torch.float32)
    # `where`, not a product: rows past the last expert's end are uninitialised after a grouped product.
    present_T = row_T < rows_ND.shape[0]
    chosen_TD = rows_ND.index_select(0, row_T.clamp(max=rows_ND.shape[0] - 1)).float()
    return torch.where(present_T[:, None], chosen_TD, 0.0)


class _Gather(torch.autograd.Function):
    """[T, D] tokens -> [N, D] rows. Its gradient sums a token's rows by gathering them: exact and repeatable."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.row_map = row_map
        return _token_rows(x_TD, row_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        row_map = ctx.row_map
        total_TD = _choice_rows(grad_ND, row_map, 0)
        for choice in range(1, row_map.row_TK.shape[1]):
            total_TD = total_TD + _choice_rows(grad_ND, row_map, choice)
        return total_TD.to(grad_ND.dtype), None


class _Combine(torch.autograd.Function):
    """[N, D] rows and [T, K] weights -> [T, D] weighted sums, accumulated in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, weights_TK: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        ctx.save_for_backward(rows_ND, weights_TK)
        ctx.row_map = row_map
        total_TD = _choice_rows(rows_ND, row_map, 0) * weights_TK[:, 0, None]
        for choice in range(1, weights_TK.shape[1]):
            total_TD = total_TD + _choice_rows(rows_ND, row_map, choice) * weights_TK[:, choice, None]
        return total_TD.to(rows_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        row_map: RowMap = ctx.row_map
        flat_A = weights_TK.reshape(-1)
        weight_N = torch.cat([flat_A, flat_A.new_zeros(1)])[row_map.assignment_N]
        grad_rows_ND = (_token_rows(grad_TD, row_map).float() * weight_N[:, None]).to(rows_ND.dtype)
        grad_float_TD = grad_TD.float()
        grad_weights = [
            (_choice_rows(rows_ND, row_map, choice) * grad_float_TD).sum(-1) for choice in range(weights_TK.shape[1])
        ]
        return grad_rows_ND, torch.stack(grad_weights, dim=1).to(weights_TK.dtype), None


class _Permute(torch.autograd.Function):
    """Reorder rows; the gradient is the inverse order, without the scatter-add that `index_select` would do."""

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor) -> torch.Tensor:
        ctx.inverse_N = inverse_N
        return rows_ND.index_select(0, order_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_ND.index_select(0, ctx.inverse_N), None, None


def _regroup(receive_RL: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that takes rows sorted by (source rank, expert) to (expert, source rank), and its inverse."""
    counts_RL = torch.tensor(receive_RL)
    num_experts = counts_RL.shape[1]
    expert_N = torch.arange(num_experts).repeat(counts_RL.shape[0]).repeat_interleave(counts_RL.flatten())
    to_expert_N = expert_N.argsort(stable=True)
    to_source_N = torch.empty_like(to_expert_N).scatter_(0, to_expert_N, torch.arange(to_expert_N.numel()))
    return to_expert_N.to(device, non_blocking=True), to_source_N.to(device, non_blocking=True)


def _swap_leading(rows_ND: torch.Tensor, first: int, second: int, capacity: int) -> torch.Tensor:
    """[first * second * C, D] -> [second * first * C, D], rows grouped by the second index."""
    return rows_ND.view(first, second, capacity, -1).transpose(0, 1).reshape(rows_ND.shape)
