"""Steps 4 and 6, dispatch and combine: tokens to the ranks of their experts, results back to the tokens.

Four implementations, which differ in the rows that travel:

* `LocalDispatch`: one expert rank. Nothing travels; shapes are static and the host reads nothing.
* `PaddedDispatch`: full [E, C, D] buffers with equal splits; needs a capacity. Static shapes and no host read, where
  the largest number of tokens of any rank is known beforehand; otherwise the ranks agree on C first.
* `VariableDispatch`: only the kept rows. Exchanges the counts first and reads them on the host, once per layer.
* `dsmoe.moe.hierarchical.HierarchicalDispatch`: to other nodes one row per token and node.

Overlap: rows leave in `dispatch`, and each `PendingChunk` waits for its part of them. The dense path (shared expert,
residual MLP) is computed in between, and its gradients between the same two points of the backward pass. Dense work
hides the exchange towards the experts and not the return exchange, because a layer's first rows leave while no expert
has work yet, whereas results can return while other experts compute: with several chunks, the rows of one travel while
the experts work on the next, and so do their gradients. All chunks leave at once, one behind the other, so there is
one exchange of counts and one host read for all of them. Chunks change no result: drops are decided before, and a
token's choices are summed when all have returned, so only the order of the sums in the experts' weight gradients
depends on the number of chunks.

Router weights travel with their rows. So the experts return weighted rows, combining is a plain sum, and no output of
an expert has to be kept for the backward pass.

Shape suffixes: see `dsmoe.moe`.
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
class ReturnRoute:
    """The way back of the rows of one exchange.

    Attributes:
        sent: the row that each assignment was sent as, over all chunks.
        exchange: the exchange that brought the rows.
    """

    sent: RowMap
    exchange: Exchange

    def take_back(self, output_UD: torch.Tensor) -> torch.Tensor:
        """Return the results to the ranks that sent the rows, and sum those of each source row."""
        return sum_rows(all_to_all(output_UD, self.exchange.reversed()), self.sent)


@dataclass(frozen=True)
class Dispatched:
    """The rows that the experts of this rank work on.

    Attributes:
        source_UD: rows in any order.
        weights_UK: their router weights, fp32.
        row_map: sorts the rows by local expert, each source row once per choice.
        ends_L: the end of each expert's rows; int32, on the device.
        route: the return route; None where nothing travelled.
        node_route: the return route inside the node to the ranks that relayed the rows; None without a second level.
    """

    source_UD: torch.Tensor
    weights_UK: torch.Tensor
    row_map: RowMap
    ends_L: torch.Tensor
    route: ReturnRoute | None = None
    node_route: ReturnRoute | None = None


PendingChunk = Callable[[], Dispatched]
"""One chunk of the rows sent to this rank; calling it waits for them."""

Experts = Callable[[Dispatched], torch.Tensor]
"""The weighted sum of the local experts' outputs for each source row, [U, D]."""


class Dispatch(Protocol):
    """An exchange of tokens and results, as the layer uses it."""

    traffic: Traffic

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[PendingChunk]:
        """Send [T, D] tokens and their [T, K] weights to the experts, without waiting."""

    def combine(self, chunks: Sequence[PendingChunk], experts: Experts) -> torch.Tensor:
        """Run the experts on each chunk as it is received, return the results and sum each token's: [T, D]."""


@dataclass
class LocalDispatch:
    """All experts on this rank: the tokens are the source rows; dropped ones stand behind the last expert's end."""

    traffic: Traffic = field(default_factory=Traffic)

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[PendingChunk]:
        """See `Dispatch.dispatch`; U = T, and N = A, or E * C where that is less. One chunk: nothing travels."""
        ends_L = assignments.kept_E.cumsum(0)
        # Static: how many are kept is known on the device alone, but never more than assignments or places.
        num_rows = assignments.order_A.numel()
        if assignments.capacity is not None:
            num_rows = min(num_rows, assignments.capacity * assignments.kept_E.numel())
        row_map = RowMap.from_assignments(assignments, ends_L - assignments.kept_E, num_rows)
        dispatched = Dispatched(x_TD, weights_TK, row_map, ends_L.int())
        return [lambda: dispatched]

    def combine(self, chunks: Sequence[PendingChunk], experts: Experts) -> torch.Tensor:
        """See `Dispatch.combine`: the experts have summed already."""
        return experts(chunks[0]())


@dataclass
class MultiRankDispatch:
    """The part that all exchanges over several ranks share: X = `num_chunks` chunks, and the return of the results."""

    group: ExpertGroup
    num_chunks: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def combine(self, chunks: Sequence[PendingChunk], experts: Experts) -> torch.Tensor:
        """See `Dispatch.combine`."""
        returning = []
        for chunk in chunks:
            dispatched = chunk()
            output_UD, route = experts(dispatched), dispatched.route
            assert route is not None
            if dispatched.node_route is not None:
                # Waits: the sum over the ranks of the node is what travels on.
                output_UD = dispatched.node_route.take_back(output_UD)
            # Without waiting: the experts go on with the next chunk while these results travel.
            returning.append((start_all_to_all(output_UD, route.exchange.reversed()), route.sent))
        # `sent` maps the rows of all chunks, so a token's results are summed at once, whatever the number of chunks.
        return sum_rows(_join([flight.wait() for flight, _ in returning]), returning[0][1])


class PaddedDispatch(MultiRankDispatch):
    """Every rank sends every other exactly C rows for each of its experts; unused rows are zero.

    C is the capacity of the rank with the most tokens. Each rank keeps to its own capacity. A chunk is a run of places
    within every expert, so that its buffer is as static as the whole.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[PendingChunk]:
        """See `Dispatch.dispatch`; over all chunks U = N = R * L * C = E * C."""
        assert assignments.capacity is not None, "PaddedDispatch needs a capacity"
        capacity = assignments.slots
        num_experts, ranks = assignments.assigned_E.numel(), self.group.size
        # Agreed on as well: a rank that asks for the largest C beside one that knows it would wait for ever.
        slots = "as the fullest rank needs" if capacity is None else f"{capacity} rows each"
        agree(
            self.group, x_TD, num_experts, f"top {assignments.num_choices}, padded, {slots}{in_chunks(self.num_chunks)}"
        )
        if capacity is None:
            # A collective, and the one host read of this dispatch.
            capacity = largest_of(assignments.capacity, self.group, x_TD.device)
        elif capacity < assignments.capacity:
            raise ValueError(
                f"{len(x_TD)} tokens came to this MoE layer, whose max_tokens has room for {capacity} rows per expert "
                f"and not for {assignments.capacity}; raise max_tokens"
            )
        num_chunks = min(self.num_chunks, capacity)  # no chunk without a place
        # Differences of x * C // X, so that they sum to C; `_slots` has the same borders.
        sizes = [capacity * (chunk + 1) // num_chunks - capacity * chunk // num_chunks for chunk in range(num_chunks)]
        # Equal parts for all ranks, whatever the chunk: one exchange describes them all.
        route = ReturnRoute(_slots(assignments, capacity, num_chunks), Exchange(self.group, self.traffic))
        rows = [num_experts * size for size in sizes]
        flights = _send(x_TD, weights_TK, route.sent, [route.exchange] * num_chunks, rows)
        chunks = []
        for flight, size in zip(flights, sizes, strict=True):
            by_expert = _by_local_expert(ranks, num_experts // ranks, size, x_TD.device)
            chunks.append(_pending(flight, *by_expert, route))
        return chunks


class VariableDispatch(MultiRankDispatch):
    """Only kept rows travel, as many as there are: dropless training, or a capacity without padding.

    A chunk is a run of tokens.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[PendingChunk]:
        """See `Dispatch.dispatch`; U = N is the number of rows that the ranks of the group send to this one."""
        num_chunks, ranks = self.num_chunks, self.group.size
        num_experts = assignments.assigned_E.numel()
        agree(self.group, x_TD, num_experts, f"top {assignments.num_choices}, not padded{in_chunks(num_chunks)}")
        if num_chunks > 1:
            # Sorted by (chunk, expert), so that the rows of a chunk follow one another and can leave by themselves.
            experts_TK = by_chunk(assignments.kept_experts(), num_experts, num_chunks)
            assignments = Assignments.all_kept(experts_TK, num_chunks * num_experts, assignments.complete)
        # E stands for (chunk, rank, local expert) from here on: X * R * L entries.
        sent_E = assignments.kept_E
        sent_XRL = sent_E.view(num_chunks, ranks, -1)
        # [R, X, L] on the wire: the exchange cuts the first dimension, and every rank gets all chunks' counts at once.
        received = exchange_counts(sent_XRL.transpose(0, 1).flatten(), self.group)
        received_XRL = received.view(ranks, num_chunks, -1).transpose(0, 1)
        # The one host read of this dispatch: how many rows to send to, and to expect from, each rank.
        send_XR, receive_XR = torch.stack([sent_XRL, received_XRL]).sum(-1).tolist()
        sizes = [sum(send_R) for send_R in send_XR]
        sent = RowMap.from_assignments(assignments, sent_E.cumsum(0) - sent_E, sum(sizes))
        exchanges = [Exchange(self.group, self.traffic, *counts) for counts in zip(send_XR, receive_XR, strict=True)]
        # All chunks leave before anything waits; `PendingChunk`s wait in the same order on every rank.
        flights = _send(x_TD, weights_TK, sent, exchanges, sizes)
        chunks = []
        for flight, exchange, counts_RL, receive_R in zip(flights, exchanges, received_XRL, receive_XR, strict=True):
            # As received, rows stand by (rank, expert); a grouped product wants each expert's rows in one run.
            row_map, ends_L = _regroup(counts_RL, sum(receive_R)), counts_RL.sum(0).cumsum(0).int()
            chunks.append(_pending(flight, row_map, ends_L, ReturnRoute(sent, exchange)))
        return chunks


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
    # After the sum: the dense path may have biases, and then an output for a token of zeros too.
    return joined_TD if mask_T is None else joined_TD * mask_T[:, None]


def cut(rows_ND: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Cut rows into chunks; a single one is not copied in the backward pass, as `split` would."""
    return [rows_ND] if len(sizes) == 1 else rows_ND.split(list(sizes))


def _join(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the rows of all chunks; a single one is not copied."""
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))


def in_chunks(num_chunks: int) -> str:
    """Describe the chunks in what the ranks agree on (`dsmoe.parallel.shape_check`)."""
    return f" in {num_chunks} chunks" if num_chunks > 1 else ""


Flight = tuple[InFlight, InFlight]
"""Rows and their weights, under way."""


def _send(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, sent: RowMap, exchanges: Sequence[Exchange], sizes: Sequence[int]
) -> list[Flight]:
    """Send the chunks of rows and their weights; the second exchange is D times smaller."""
    # Apart, since weights stay fp32 where rows are bf16.
    rows, weights = cut(gather_rows(x_TD, sent), sizes), cut(gather_weights(weights_TK, sent)[:, None], sizes)
    return [
        (start_all_to_all(rows_ND, exchange), start_all_to_all(weights_N1, exchange))
        for rows_ND, weights_N1, exchange in zip(rows, weights, exchanges, strict=True)
    ]


def _pending(flight: Flight, row_map: RowMap, ends_L: torch.Tensor, route: ReturnRoute) -> PendingChunk:
    # A function of its own: a lambda in the loop of the caller would find the variables of the last chunk.
    rows, weights = flight
    return lambda: Dispatched(rows.wait(), weights.wait(), row_map, ends_L, route)


# E = 2, C = 3, two chunks. Chunk x has the places from x * 3 // 2 on: place 0, and places 1 and 2.
#   buffer    chunk 0   chunk 1
#   rows      0   1     2   3   4   5
#   expert    0   1     0   0   1   1
#   place     0   0     1   2   1   2
def _slots(assignments: Assignments, capacity: int, num_chunks: int) -> RowMap:
    """Return the row of each assignment in the buffers [E, places of the chunk] of all chunks, one behind the other."""
    num_experts, place_A = assignments.assigned_E.numel(), assignments.place_A
    # The last x whose first place, x * C // X, is at most `place`: x * C < (place + 1) * X.
    chunk_A = ((place_A + 1) * num_chunks - 1) // capacity
    first_A = chunk_A * capacity // num_chunks
    size_A = (chunk_A + 1) * capacity // num_chunks - first_A
    # Of a dropped or masked assignment this is nonsense, possibly another's row: replaced below.
    row_A = first_A * num_experts + assignments.expert_A * size_A + place_A - first_A
    num_rows = num_experts * capacity
    row_A = torch.where(assignments.kept_A, row_A, num_rows)  # N is no row
    return RowMap.from_rows(assignments.order_A, row_A, assignments.num_choices, num_rows, complete=False)


def _by_local_expert(ranks: int, per_rank: int, size: int, device: torch.device) -> tuple[RowMap, torch.Tensor]:
    """Return the order from [R, L, places], as rows are received, to [L, R, places], and the end of each expert's."""
    # Full buffers, zeros included: the order depends on sizes alone, and no count is exchanged.
    place_N = torch.arange(ranks * per_rank * size, device=device)
    order_N = place_N.view(ranks, per_rank, size).transpose(0, 1).flatten()
    inverse_N = place_N.view(per_rank, ranks, size).transpose(0, 1).flatten()
    ends_L = torch.arange(1, per_rank + 1, dtype=torch.int32, device=device) * (ranks * size)
    return RowMap.permutation(order_N, inverse_N), ends_L


# Two ranks send rows for two experts: a0 a1 a1 from rank a, b0 b0 b1 from rank b.
#   counts_RL  [[1, 2], [2, 1]]
#   first_RL   [[0, 1], [3, 5]]         where each block begins as received
#   target     [[0, 3], [1, 5]]         where it begins by expert: a0 b0 b0 a1 a1 b1
#   shift_N    [0, 2, 2, -2, -2, 0]     of each received row
#   inverse_N  [0, 3, 4, 1, 2, 5]       its row by expert
def _regroup(counts_RL: torch.Tensor, num_rows: int) -> RowMap:
    """Return the order from rows sorted by (source rank, expert) to (expert, source rank), without sorting."""
    counts_LR = counts_RL.t()
    first_RL = counts_RL.flatten().cumsum(0).view_as(counts_RL) - counts_RL
    target_LR = counts_LR.flatten().cumsum(0).view_as(counts_LR) - counts_LR
    # `output_size` is on the host already; without it torch would read the sum of the counts.
    # Each block of rows moves as a whole.
    shift_N = (target_LR.t() - first_RL).flatten().repeat_interleave(counts_RL.flatten(), output_size=num_rows)
    place_N = torch.arange(num_rows, device=counts_RL.device)
    inverse_N = place_N + shift_N
    # The inverse by a scatter to distinct places: no sort.
    return RowMap.permutation(torch.empty_like(place_N).scatter_(0, inverse_N, place_N), inverse_N)
