"""Steps 4 and 6, dispatch and combine: bring tokens to the ranks of the experts they chose, and the results home.

Three ways, which differ only in what travels:

* `LocalDispatch`: one expert rank. Nothing travels; shapes are static and the host reads nothing.
* `PaddedDispatch`: full [E, C, D] buffers with equal splits; needs a capacity. Static shapes and no host read, where
  the largest number of tokens of any rank is known beforehand; otherwise the ranks agree on C first.
* `VariableDispatch`: only the kept rows. Exchanges the counts first and reads them on the host, once per layer.

Rows leave in `dispatch` and are waited for in the call of what it returns. What every token passes besides its experts
(shared expert, residual MLP) is computed in between, and its gradients between the same two points of the backward
pass. That covers the exchange on the way out, or as much of it as the dense work lasts; the one on the way home is
waited for at once. Rather this one, because the first rows of a layer leave when no expert has anything to do yet,
whereas results can be sent home while other experts still compute.

Router weights travel with their rows, so that the experts return weighted rows, combining is a plain sum, and no
output of an expert has to be kept for the backward pass.

Shape suffixes: see `dsmoe.moe.router`; S source rows, which are the tokens or what has arrived from other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dsmoe.moe.capacity import Assignments
from dsmoe.moe.rows import RowMap, gather_rows, gather_weights, sum_rows
from dsmoe.parallel.agreement import agree
from dsmoe.parallel.collectives import Exchange, Traffic, all_to_all, exchange_counts, largest_of, start_all_to_all
from dsmoe.parallel.groups import ExpertGroup


@dataclass(frozen=True)
class WayHome:
    """What `combine` needs: which row each assignment was sent as, and the exchange that takes the rows back."""

    sent: RowMap
    exchange: Exchange


@dataclass(frozen=True)
class Dispatched:
    """What the experts of this rank work on.

    `source_SD` are rows in any order and `weights_SK` (fp32) their router weights; `row_map` sorts them by local
    expert, each source row once per choice; `ends_L` (int32, on the device) says where each expert's rows end.
    """

    source_SD: torch.Tensor
    weights_SK: torch.Tensor
    row_map: RowMap
    ends_L: torch.Tensor
    home: WayHome | None = None


Arrival = Callable[[], Dispatched]
"""Waits until what was sent to this rank is here."""


class Dispatch(Protocol):
    """What the layer needs of a way to exchange tokens."""

    traffic: Traffic

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> Arrival:
        """Let [T, D] tokens and their [T, K] weights leave for the experts."""

    def combine(self, output_SD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Bring the experts' weighted output for each source row home and sum each token's: [T, D]."""


@dataclass
class LocalDispatch:
    """All experts are on this rank: the tokens are the source, and dropped rows stand behind the last expert's end."""

    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> Arrival:
        """See `Dispatch.dispatch`; S = T, and N = A, or E * C where that is less."""
        ends_L = assignments.kept_E.cumsum(0)
        num_rows = assignments.order_A.numel()
        if assignments.capacity is not None:
            num_rows = min(num_rows, assignments.capacity * assignments.kept_E.numel())
        row_map = RowMap.of(assignments, ends_L - assignments.kept_E, num_rows)
        dispatched = Dispatched(x_TD, weights_TK, row_map, ends_L.int())
        return lambda: dispatched

    def combine(self, output_SD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatch.combine`: the experts have summed already."""
        return output_SD


@dataclass
class PaddedDispatch:
    """Every rank sends every other exactly C rows for each of its experts; unused rows are zero.

    C is the capacity of the rank with the most tokens. Each rank keeps to its own capacity.
    """

    group: ExpertGroup
    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> Arrival:
        """See `Dispatch.dispatch`; S = N = R * L * C = E * C."""
        assert assignments.capacity is not None, "PaddedDispatch needs a capacity"
        capacity = assignments.slots
        slots = "as the fullest rank needs" if capacity is None else f"{capacity} rows each"
        agree(self.group, x_TD, assignments.assigned_E.numel(), f"padded, {slots}")
        if capacity is None:
            capacity = largest_of(assignments.capacity, self.group, x_TD.device)
        elif capacity < assignments.capacity:
            raise ValueError(f"{len(x_TD)} tokens came to this MoE layer, which is more than its max_tokens")
        num_experts, ranks = assignments.assigned_E.numel(), self.group.size
        per_rank = num_experts // ranks
        first_E = torch.arange(num_experts, device=x_TD.device) * capacity
        sent = RowMap.of(assignments, first_E, num_experts * capacity)
        home = WayHome(sent, Exchange(self.group, self.traffic))
        # Arrived rows stand as [R, L, C]; the experts want [L, R, C].
        place_N = torch.arange(num_experts * capacity, device=x_TD.device)
        order_N = place_N.view(ranks, per_rank, capacity).transpose(0, 1).flatten()
        inverse_N = place_N.view(per_rank, ranks, capacity).transpose(0, 1).flatten()
        ends_L = torch.arange(1, per_rank + 1, dtype=torch.int32, device=x_TD.device) * (ranks * capacity)
        return _send(x_TD, weights_TK, home, RowMap.permutation(order_N, inverse_N), ends_L)

    def combine(self, output_SD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatch.combine`."""
        return _bring_home(output_SD, dispatched)


@dataclass
class VariableDispatch:
    """Only kept rows travel, as many as there are: dropless training, or a capacity without padding."""

    group: ExpertGroup
    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> Arrival:
        """See `Dispatch.dispatch`; S = N is what the ranks of the group send here."""
        sent_E, ranks = assignments.kept_E, self.group.size
        agree(self.group, x_TD, sent_E.numel(), "not padded")
        received_E = exchange_counts(sent_E, self.group)
        # The one host read of this dispatch: how many rows to send to, and to expect from, each rank.
        send_R, receive_R = torch.stack([sent_E, received_E]).view(2, ranks, -1).sum(-1).tolist()
        sent = RowMap.of(assignments, sent_E.cumsum(0) - sent_E, sum(send_R))
        home = WayHome(sent, Exchange(self.group, self.traffic, send_R, receive_R))
        counts_RL = received_E.view(ranks, -1)
        ends_L = counts_RL.sum(0).cumsum(0).int()
        return _send(x_TD, weights_TK, home, _regroup(counts_RL, sum(receive_R)), ends_L)

    def combine(self, output_SD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatch.combine`."""
        return _bring_home(output_SD, dispatched)


def choose_dispatch(group: ExpertGroup, padded: bool) -> Dispatch:
    """The way to exchange tokens over `group`; `padded` where a capacity is set and static shapes are wanted."""
    if group.size == 1:
        return LocalDispatch()
    return PaddedDispatch(group) if padded else VariableDispatch(group)


def _send(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, home: WayHome, row_map: RowMap, ends_L: torch.Tensor
) -> Arrival:
    """Let the rows and their weights leave; the second exchange is D times smaller."""
    source = start_all_to_all(gather_rows(x_TD, home.sent), home.exchange)
    weights = start_all_to_all(gather_weights(weights_TK, home.sent)[:, None], home.exchange)
    return lambda: Dispatched(source.wait(), weights.wait(), row_map, ends_L, home)


def _bring_home(output_SD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
    home = dispatched.home
    assert home is not None
    return sum_rows(all_to_all(output_SD, home.exchange.reversed()), home.sent)


def _regroup(counts_RL: torch.Tensor, num_rows: int) -> RowMap:
    """The order that takes rows sorted by (source rank, expert) to (expert, source rank), without sorting."""
    counts_LR = counts_RL.t()
    first_RL = counts_RL.flatten().cumsum(0).view_as(counts_RL) - counts_RL
    target_LR = counts_LR.flatten().cumsum(0).view_as(counts_LR) - counts_LR
    # Each block of rows moves as a whole, from where it arrived to where its expert wants it.
    shift_N = (target_LR.t() - first_RL).flatten().repeat_interleave(counts_RL.flatten(), output_size=num_rows)
    place_N = torch.arange(num_rows, device=counts_RL.device)
    inverse_N = place_N + shift_N
    return RowMap.permutation(torch.empty_like(place_N).scatter_(0, inverse_N, place_N), inverse_N)
