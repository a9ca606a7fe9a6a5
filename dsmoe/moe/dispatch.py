"""Steps 4 and 6, dispatch and combine: bring tokens to the ranks of the experts they chose, and the results home.

Four ways, which differ only in what travels:

* `LocalDispatch`: one expert rank. Nothing travels; shapes are static and the host reads nothing.
* `PaddedDispatch`: full [E, C, D] buffers with equal splits; needs a capacity. Static shapes and no host read, where
  the largest number of tokens of any rank is known beforehand; otherwise the ranks agree on C first.
* `VariableDispatch`: only the kept rows. Exchanges the counts first and reads them on the host, once per layer.
* `dsmoe.moe.hierarchical.HierarchicalDispatch`: to other nodes one row per token and node.

Rows leave in `dispatch` and are waited for in the call of what it returns. What every token passes besides its experts
(shared expert, residual MLP) is computed in between, and its gradients between the same two points of the backward
pass. That covers the exchange on the way out, or as much of it as the dense work lasts; the one on the way home is
waited for at once. Rather this one, because the first rows of a layer leave when no expert has anything to do yet,
whereas results can be sent home while other experts still compute: with several chunks, those of one travel while the
experts work on the next, and so do their gradients. All chunks leave at once, one behind the other, so there is one
exchange of counts and one host read for all of them. A chunk is a part of the rows and nothing else: which tokens are
dropped is decided before, and a token's choices are summed when all are home, so nothing but the order of the sums in
the experts' weight gradients depends on how many there are.

Router weights travel with their rows, so that the experts return weighted rows, combining is a plain sum, and no
output of an expert has to be kept for the backward pass.

Shape suffixes: see `dsmoe.moe.router`; S source rows, which are the tokens or what has arrived from other ranks;
H chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dsmoe.moe.capacity import Assignments, by_chunk
from dsmoe.moe.permutation import RowMap, gather_rows, gather_weights, sum_rows
from dsmoe.parallel.collectives import (
    Exchange,
    InFlight,
    Traffic,
    all_to_all,
    exchange_counts,
    largest_of,
    start_all_to_all,
)
from dsmoe.parallel.groups import ExpertGroup
from dsmoe.parallel.shape_check import agree


@dataclass(frozen=True)
class WayHome:
    """Which row each assignment was sent as, over all chunks, and the exchange that the rows came by."""

    sent: RowMap
    exchange: Exchange

    def take(self, output_SD: torch.Tensor) -> torch.Tensor:
        """Take the rows back and sum those of each source row."""
        return sum_rows(all_to_all(output_SD, self.exchange.reversed()), self.sent)


@dataclass(frozen=True)
class Dispatched:
    """What the experts of this rank work on.

    `source_SD` are rows in any order and `weights_SK` (fp32) their router weights; `row_map` sorts them by local
    expert, each source row once per choice; `ends_L` (int32, on the device) says where each expert's rows end. `relay`
    is, where a second exchange has brought them here, the way back to the first.
    """

    source_SD: torch.Tensor
    weights_SK: torch.Tensor
    row_map: RowMap
    ends_L: torch.Tensor
    home: WayHome | None = None
    relay: WayHome | None = None


Arrival = Callable[[], Dispatched]
"""Waits until one chunk of what was sent to this rank is here."""

Experts = Callable[[Dispatched], torch.Tensor]
"""The weighted sum of the local experts' outputs for each source row, [S, D]."""


class Dispatch(Protocol):
    """What the layer needs of a way to exchange tokens."""

    traffic: Traffic

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[Arrival]:
        """Let [T, D] tokens and their [T, K] weights leave for the experts."""

    def combine(self, arrivals: Sequence[Arrival], experts: Experts) -> torch.Tensor:
        """Let the experts work on each chunk when it is here, bring the results home, sum each token's: [T, D]."""


@dataclass
class LocalDispatch:
    """All experts are on this rank: the tokens are the source, and dropped rows stand behind the last expert's end."""

    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[Arrival]:
        """See `Dispatch.dispatch`; S = T, and N = A, or E * C where that is less. One chunk: nothing travels."""
        ends_L = assignments.kept_E.cumsum(0)
        num_rows = assignments.order_A.numel()
        if assignments.capacity is not None:
            num_rows = min(num_rows, assignments.capacity * assignments.kept_E.numel())
        row_map = RowMap.of(assignments, ends_L - assignments.kept_E, num_rows)
        dispatched = Dispatched(x_TD, weights_TK, row_map, ends_L.int())
        return [lambda: dispatched]

    def combine(self, arrivals: Sequence[Arrival], experts: Experts) -> torch.Tensor:
        """See `Dispatch.combine`: the experts have summed already."""
        return experts(arrivals[0]())


@dataclass
class OverRanks:
    """What the ways over several ranks have in common: `num_chunks` chunks, H, and the way home."""

    group: ExpertGroup
    num_chunks: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def combine(self, arrivals: Sequence[Arrival], experts: Experts) -> torch.Tensor:
        """See `Dispatch.combine`."""
        leaving = []
        for arrival in arrivals:
            dispatched = arrival()
            output_SD, home = experts(dispatched), dispatched.home
            assert home is not None
            if dispatched.relay is not None:
                output_SD = dispatched.relay.take(output_SD)
            leaving.append((start_all_to_all(output_SD, home.exchange.reversed()), home.sent))
        return sum_rows(_join([flight.wait() for flight, _ in leaving]), leaving[0][1])


class PaddedDispatch(OverRanks):
    """Every rank sends every other exactly C rows for each of its experts; unused rows are zero.

    C is the capacity of the rank with the most tokens. Each rank keeps to its own capacity. A chunk is a run of places
    within every expert, so that its buffer is as static as the whole.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[Arrival]:
        """See `Dispatch.dispatch`; over all chunks S = N = R * L * C = E * C."""
        assert assignments.capacity is not None, "PaddedDispatch needs a capacity"
        capacity = assignments.slots
        num_experts, ranks = assignments.assigned_E.numel(), self.group.size
        slots = "as the fullest rank needs" if capacity is None else f"{capacity} rows each"
        agree(
            self.group, x_TD, num_experts, f"top {assignments.num_choices}, padded, {slots}{in_chunks(self.num_chunks)}"
        )
        if capacity is None:
            capacity = largest_of(assignments.capacity, self.group, x_TD.device)
        elif capacity < assignments.capacity:
            raise ValueError(
                f"{len(x_TD)} tokens came to this MoE layer, whose max_tokens has room for {capacity} rows per expert "
                f"and not for {assignments.capacity}; raise max_tokens"
            )
        num_chunks = min(self.num_chunks, capacity)
        sizes = [capacity * (chunk + 1) // num_chunks - capacity * chunk // num_chunks for chunk in range(num_chunks)]
        home = WayHome(_slots(assignments, capacity, num_chunks), Exchange(self.group, self.traffic))
        rows = [num_experts * size for size in sizes]
        flights = _send(x_TD, weights_TK, home.sent, [home.exchange] * num_chunks, rows)
        arrivals = []
        for flight, size in zip(flights, sizes, strict=True):
            by_expert = _by_local_expert(ranks, num_experts // ranks, size, x_TD.device)
            arrivals.append(_arrival(flight, *by_expert, home))
        return arrivals


class VariableDispatch(OverRanks):
    """Only kept rows travel, as many as there are: dropless training, or a capacity without padding.

    A chunk is a run of tokens.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[Arrival]:
        """See `Dispatch.dispatch`; S = N is what the ranks of the group send here."""
        num_chunks, ranks = self.num_chunks, self.group.size
        num_experts = assignments.assigned_E.numel()
        agree(self.group, x_TD, num_experts, f"top {assignments.num_choices}, not padded{in_chunks(num_chunks)}")
        if num_chunks > 1:
            experts_TK = by_chunk(assignments.kept_experts(), num_experts, num_chunks)
            assignments = Assignments.of(experts_TK, num_chunks * num_experts, assignments.complete)
        sent_E = assignments.kept_E
        sent_HRL = sent_E.view(num_chunks, ranks, -1)
        received = exchange_counts(sent_HRL.transpose(0, 1).flatten(), self.group)
        received_HRL = received.view(ranks, num_chunks, -1).transpose(0, 1)
        # The one host read of this dispatch: how many rows to send to, and to expect from, each rank.
        send_HR, receive_HR = torch.stack([sent_HRL, received_HRL]).sum(-1).tolist()
        sizes = [sum(send_R) for send_R in send_HR]
        sent = RowMap.of(assignments, sent_E.cumsum(0) - sent_E, sum(sizes))
        exchanges = [Exchange(self.group, self.traffic, *counts) for counts in zip(send_HR, receive_HR, strict=True)]
        flights = _send(x_TD, weights_TK, sent, exchanges, sizes)
        arrivals = []
        for flight, exchange, counts_RL, receive_R in zip(flights, exchanges, received_HRL, receive_HR, strict=True):
            row_map, ends_L = _regroup(counts_RL, sum(receive_R)), counts_RL.sum(0).cumsum(0).int()
            arrivals.append(_arrival(flight, row_map, ends_L, WayHome(sent, exchange)))
        return arrivals


def join_dense(
    y_TD: torch.Tensor, dense_TD: torch.Tensor, mix_T2: torch.Tensor | None, mask_T: torch.Tensor | None
) -> torch.Tensor:
    """Add the output of the dense path to that of the experts: [T, D].

    Args:
        y_TD: the experts' output.
        dense_TD: the dense path's output.
        mix_T2: the weight of either, experts first; None weighs both with 1.
        mask_T: bool; the output is zero where it is False.
    """
    joined_TD = y_TD + dense_TD if mix_T2 is None else y_TD * mix_T2[:, :1] + dense_TD * mix_T2[:, 1:]
    return joined_TD if mask_T is None else joined_TD * mask_T[:, None]


def cut(rows_ND: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """The chunks of rows; one is not copied in the backward pass."""
    return [rows_ND] if len(sizes) == 1 else rows_ND.split(list(sizes))


def _join(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all chunks; one is not copied."""
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))


def in_chunks(num_chunks: int) -> str:
    """For what ranks agree on."""
    return f" in {num_chunks} chunks" if num_chunks > 1 else ""


Flight = tuple[InFlight, InFlight]
"""Rows and their weights."""


def _send(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, sent: RowMap, exchanges: Sequence[Exchange], sizes: Sequence[int]
) -> list[Flight]:
    """Let the chunks of rows and their weights leave; the second exchange is D times smaller."""
    rows, weights = cut(gather_rows(x_TD, sent), sizes), cut(gather_weights(weights_TK, sent)[:, None], sizes)
    return [
        (start_all_to_all(rows_ND, exchange), start_all_to_all(weights_N1, exchange))
        for rows_ND, weights_N1, exchange in zip(rows, weights, exchanges, strict=True)
    ]


def _arrival(flight: Flight, row_map: RowMap, ends_L: torch.Tensor, home: WayHome) -> Arrival:
    rows, weights = flight
    return lambda: Dispatched(rows.wait(), weights.wait(), row_map, ends_L, home)


def _slots(assignments: Assignments, capacity: int, num_chunks: int) -> RowMap:
    """The row of each assignment in buffers [E, places of the chunk] of all chunks, one behind the other."""
    num_experts, place_A = assignments.assigned_E.numel(), assignments.place_A
    chunk_A = ((place_A + 1) * num_chunks - 1) // capacity
    first_A = chunk_A * capacity // num_chunks
    size_A = (chunk_A + 1) * capacity // num_chunks - first_A
    row_A = first_A * num_experts + assignments.expert_A * size_A + place_A - first_A
    num_rows = num_experts * capacity
    row_A = torch.where(assignments.kept_A, row_A, num_rows)
    return RowMap.placed(assignments.order_A, row_A, assignments.num_choices, num_rows, complete=False)


def _by_local_expert(ranks: int, per_rank: int, size: int, device: torch.device) -> tuple[RowMap, torch.Tensor]:
    """Rows arrive as [R, L, places]; the experts want [L, R, places]. With where each expert's end."""
    place_N = torch.arange(ranks * per_rank * size, device=device)
    order_N = place_N.view(ranks, per_rank, size).transpose(0, 1).flatten()
    inverse_N = place_N.view(per_rank, ranks, size).transpose(0, 1).flatten()
    ends_L = torch.arange(1, per_rank + 1, dtype=torch.int32, device=device) * (ranks * size)
    return RowMap.permutation(order_N, inverse_N), ends_L


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
