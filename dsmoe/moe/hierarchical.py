"""The exchange in two levels: one row per token and node across nodes, relayed to the ranks inside the node.

Both levels are the same hop. A rank has source rows, each with its chosen experts. To every destination that has any of
a row's experts the rank sends one copy of the row, and per choice the router weight and a code: which expert, and
whether the choice is the first of a row. The receiver thus has source rows with chosen experts again. The first hop is
to nodes, among the ranks of equal place in their nodes; the second is among the ranks of a node. The experts take a
source row once per choice and return one sum per source row. Results return by the same hops in reverse: the ranks of a
node add up their results for a row before the sum travels to another node, and the gradients likewise.

The numbers of rows and choices of both hops are announced to all ranks at once, and read on the host once.

Example: T = 4 tokens of rank 0, E = 4, K = 2, Y = 2 nodes of P = 2 ranks, so L = 1: experts 0, 1 on node 0; 2, 3 on 1.

    experts_TK    [[0, 1], [2, 3], [1, 2], [3, 4]]        4 is no expert: that choice was dropped
    to node 0     rows 0 2      choices 0:0 0:1 2:1        token:expert, sorted by node, then by token
    to node 1     rows 1 2 3    choices 1:2 1:3 2:2 3:3    in one level, token 1 would travel twice
    code_M        [1, 2, 3, 1, 2, 1, 3]                   2 * (expert % 2) + 1 for the first choice of a row

Node 1 unpacks [1, 2, 1, 3] as experts [[0, 1], [0, 2], [1, 2]] of its own, where 2 is none.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmoe.moe.balance import count_experts
from dsmoe.moe.capacity import Assignments, by_chunk, chunk_of_tokens
from dsmoe.moe.dispatch import (
    Dispatch,
    Dispatched,
    LocalDispatch,
    MultiRankDispatch,
    PaddedDispatch,
    PendingChunk,
    ReturnRoute,
    VariableDispatch,
    cut,
    in_chunks,
)
from dsmoe.moe.permutation import RowMap, gather_rows, gather_weights
from dsmoe.parallel.collectives import Exchange, InFlight, Traffic, Transfer, exchange_counts, start_all_to_all
from dsmoe.parallel.groups import ExpertGroup
from dsmoe.parallel.shape_check import agree


def choose_dispatch(group: ExpertGroup, padded: bool, num_chunks: int) -> Dispatch:
    """Return the exchange for `group`; `padded`: a capacity is set and static shapes are wanted."""
    if group.size == 1:
        return LocalDispatch()
    # First, whatever `padded` says: in two levels nothing is padded.
    if group.levels is not None:
        return HierarchicalDispatch(group, num_chunks)
    return PaddedDispatch(group, num_chunks) if padded else VariableDispatch(group, num_chunks)


class HierarchicalDispatch(MultiRankDispatch):
    """Only kept rows travel: one for each token and node, then one for each of these and rank.

    A chunk is a run of tokens. Never padded: a buffer with room for any node's rows would be as large as in one level.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[PendingChunk]:
        """See `Dispatch.dispatch`; U is the number of rows that the ranks of this node relay to this one."""
        assert self.group.levels is not None
        num_chunks, num_nodes = self.num_chunks, self.group.levels[0].size
        num_experts, experts_TK = assignments.assigned_E.numel(), assignments.kept_experts()
        rank_experts = num_experts // self.group.size
        # Before the first collective: ranks that differ in these would wait for each other, or read wrong bytes.
        agree(self.group, x_TD, num_experts, f"top {assignments.num_choices}, in two levels{in_chunks(num_chunks)}")
        # A dropped choice has expert E, and so rank E // L = R, which is none.
        hops = self._plan(experts_TK // rank_experts)
        across = [hop for hop, _ in hops]
        # The experts of one chunk and node follow each other, so chunk and node together are the destination.
        own_TK = by_chunk(experts_TK, num_experts, num_chunks)
        packed = _pack(own_TK, num_chunks * num_experts, num_experts // num_nodes, across)
        flights = _send(x_TD, weights_TK, packed, across)
        return [
            # One map of rows for all chunks: `combine` joins their results in this order, and sums each token once.
            _Relay(flight, inside, ReturnRoute(packed.rows, outside.rows), assignments.num_choices, rank_experts)
            for flight, (outside, inside) in zip(flights, hops, strict=True)
        ]

    def _plan(self, rank_TK: torch.Tensor) -> list[tuple[_Hop, _Hop]]:
        """Return both hops of each chunk, with the rows and choices that each sends and receives; rank R is none."""
        assert self.group.levels is not None
        across, inside = self.group.levels
        places, place = inside.size, inside.rank
        announced_XYW = _count(rank_TK, self.num_chunks, across.size, places)
        # All ranks of a node get the same counts: each learns what the others will relay to it.
        announced_YPXW = announced_XYW.transpose(0, 1)[:, None].expand(-1, places, -1, -1)
        # Of equal size for every pair of ranks, so that this exchange needs no counts of its own.
        received = exchange_counts(announced_YPXW.flatten(), self.group).view(across.size, places, self.num_chunks, -1)
        # Of the ranks that send to this one across nodes: those of its place.
        received_XYW = received[:, place].transpose(0, 1)
        # What each rank of this node will have to relay: the sum of what its place receives from all nodes.
        received_XPW = received.sum(0).transpose(0, 1)
        rows, choices = slice(1, 1 + places), slice(1 + places, None)
        # As `_Hop.from_counts` cuts them: rows sent and received, choices sent and received. A node's rows are counted
        # by themselves, since several of its ranks may need a row; a choice goes to one rank, so choices add up.
        outside_XY = [
            announced_XYW[..., 0],
            received_XYW[..., 0],
            announced_XYW[..., choices].sum(-1),
            received_XYW[..., choices].sum(-1),
        ]
        relayed_XW = received_XPW[:, place]
        inside_XP = [
            relayed_XW[:, rows],
            received_XPW[..., 1 + place],
            relayed_XW[:, choices],
            received_XPW[..., 1 + places + place],
        ]
        # The one host read of this dispatch: sent and received rows, sent and received choices, by chunk and peer.
        counts = torch.cat([torch.stack(outside_XY), torch.stack(inside_XP)], dim=-1).transpose(0, 1).tolist()
        return [
            (
                _Hop.from_counts(across, self.traffic, [by_peer[: across.size] for by_peer in chunk]),
                _Hop.from_counts(inside, self.traffic, [by_peer[across.size :] for by_peer in chunk]),
            )
            for chunk in counts
        ]


@dataclass(frozen=True)
class _Hop:
    """The exchanges of one chunk at one level: of rows, and of the choices' weights and codes."""

    rows: Exchange
    choices: Exchange

    @classmethod
    def from_counts(cls, group: ExpertGroup, traffic: Traffic, counts: list[list[int]]) -> _Hop:
        return cls(Exchange(group, traffic, *counts[:2]), Exchange(group, traffic, *counts[2:]))


@dataclass(frozen=True)
class _Packed:
    """Rows and choices in the order in which they travel.

    Attributes:
        rows: the row that each destination gets of each source row.
        choices: the place of each choice.
        code_M: the code of each choice; int32.
    """

    rows: RowMap
    choices: RowMap
    code_M: torch.Tensor


@dataclass(frozen=True)
class _Flight:
    """Rows, weights and codes of one chunk at one level, under way."""

    rows: InFlight
    weights: InFlight
    codes: Transfer

    def wait(self, num_choices: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait for rows [U, D] and their weights and experts [U, K]; the receiver has `num_experts` experts."""
        rows_UD, weights_M, code_M = self.rows.wait(), self.weights.wait()[:, 0], self.codes.wait()[:, 0]
        # The experts of a row differ: it has no more choices for this receiver than the receiver has experts.
        return rows_UD, *_unpack(code_M, weights_M, len(rows_UD), min(num_choices, num_experts), num_experts)


@dataclass(frozen=True)
class _Relay:
    """A `PendingChunk`: relay the rows from other nodes, and wait for the rows that the ranks of this node relay.

    Attributes:
        flight: the rows from other nodes.
        inside: the hop inside the node.
        route: the return route across nodes.
        num_choices: K.
        rank_experts: L.
    """

    flight: _Flight
    inside: _Hop
    route: ReturnRoute
    num_choices: int
    rank_experts: int

    def __call__(self) -> Dispatched:
        # Experts of this node, numbered from 0: codes carry the number within the receiver alone.
        node_experts = self.rank_experts * self.inside.rows.group.size
        rows_UD, weights_UK, experts_UK = self.flight.wait(self.num_choices, node_experts)
        packed = _pack(experts_UK, node_experts, self.rank_experts, [self.inside])
        # Collectives match by their order, and all ranks call the chunks in the same order.
        (flight,) = _send(rows_UD, weights_UK, packed, [self.inside])
        rows_UD, weights_UK, experts_UK = flight.wait(self.num_choices, self.rank_experts)
        # Drops were decided by the source rank: whatever has come is kept.
        local = Assignments.all_kept(experts_UK, self.rank_experts)
        ends_L = local.kept_E.cumsum(0)
        row_map = RowMap.from_assignments(local, ends_L - local.kept_E, sum(self.inside.choices.receive_counts or ()))
        # The results of a row are summed on the relaying rank, so that one row per token and node goes back.
        node_route = ReturnRoute(packed.rows, self.inside.rows)
        return Dispatched(rows_UD, weights_UK, row_map, ends_L.int(), self.route, node_route)


# Tokens 0 and 1 choose the ranks [[0, 1], [1, 1]] of two nodes of two ranks, in one chunk. W = 1 + 2 + 2:
#   node 0    2 rows; 1 of them for rank 0, 2 for rank 1; 1 choice for rank 0, 3 for rank 1    [2, 1, 2, 1, 3]
#   node 1    nothing                                                                          [0, 0, 0, 0, 0]
def _count(rank_TK: torch.Tensor, num_chunks: int, num_nodes: int, places: int) -> torch.Tensor:
    """Count the rows and choices that this rank has for each node and each of its ranks: [X, Y, W]."""
    num_ranks = num_nodes * places
    # A column more, for dropped choices (rank R), that is cut off: a mask would read their number on the host.
    visits_TR = torch.zeros(len(rank_TK), num_ranks + 1, dtype=torch.int32, device=rank_TK.device)
    # 1 however many of a token's choices go to the rank: that is one row.
    visits_TYP = visits_TR.scatter_(1, rank_TK, 1)[:, :num_ranks].view(-1, num_nodes, places)
    # A node gets the row if any of its ranks does.
    visits_TYW = torch.cat([visits_TYP.amax(-1, keepdim=True), visits_TYP], dim=-1)
    chunk_T = chunk_of_tokens(len(rank_TK), num_chunks, rank_TK.device)
    # Integers: the order of the additions, which a GPU does not fix, changes nothing.
    rows_XYW = visits_TYW.new_zeros(num_chunks, *visits_TYW.shape[1:]).index_add_(0, chunk_T, visits_TYW)
    choices_A = count_experts(by_chunk(rank_TK, num_ranks, num_chunks), num_chunks * num_ranks)
    choices_XYP = choices_A.view(num_chunks, num_nodes, places)
    return torch.cat([rows_XYW.long(), choices_XYP], dim=-1)


def _pack(experts_UK: torch.Tensor, num_experts: int, experts_each: int, hops: list[_Hop]) -> _Packed:
    """Sort rows and choices by destination; see the module's example.

    Args:
        experts_UK: the expert of each choice; `num_experts` is none.
        num_experts: over all destinations.
        experts_each: experts of a destination, which follow one another.
        hops: a hop for each chunk; the destinations of chunk x come before those of x + 1.
    """
    # Numbers on the host since the plan was read: every size below is static.
    num_rows, num_choices = map(sum, _sent(hops))
    # Sorted as in one level, with destinations for experts; choices without a destination come last.
    to = Assignments.all_kept(experts_UK // experts_each, num_experts // experts_each)
    source_A = to.order_A // to.num_choices
    # A source row's choices for one destination stand together: the first of them brings the row.
    first_A = to.kept_A.clone()
    first_A[1:] &= (source_A[1:] != source_A[:-1]) | (to.expert_A[1:] != to.expert_A[:-1])
    # N is no row: one choice alone holds the row, so that the row's result is added once on the return route.
    row_A = torch.where(first_A, first_A.cumsum(0) - 1, num_rows)
    # The choices that travel: all but those without a destination.
    order_M = to.order_A[:num_choices]
    code_M = experts_UK.flatten()[order_M] % experts_each * 2 + first_A[:num_choices]
    return _Packed(
        RowMap.from_rows(to.order_A, row_A, to.num_choices, num_rows, complete=False),
        RowMap.from_assignments(to, to.kept_E.cumsum(0) - to.kept_E, num_choices),
        # Half the bytes of int64.
        code_M.int(),
    )


def _sent(hops: list[_Hop]) -> tuple[list[int], list[int]]:
    """Return the numbers of rows and choices that each hop sends."""
    return [sum(hop.rows.send_counts or ()) for hop in hops], [sum(hop.choices.send_counts or ()) for hop in hops]


def _send(source_UD: torch.Tensor, weights_UK: torch.Tensor, packed: _Packed, hops: list[_Hop]) -> list[_Flight]:
    """Send each chunk's rows, weights and codes, without waiting."""
    num_rows, num_choices = _sent(hops)
    # Rows, weights and codes apart, since their dtypes differ; codes are integers and have no gradient.
    rows = cut(gather_rows(source_UD, packed.rows), num_rows)
    weights = cut(gather_weights(weights_UK, packed.choices)[:, None], num_choices)
    codes = cut(packed.code_M[:, None], num_choices)
    return [
        _Flight(
            start_all_to_all(rows_ND, hop.rows), start_all_to_all(weights_M1, hop.choices), hop.choices.start(codes_M1)
        )
        for rows_ND, weights_M1, codes_M1, hop in zip(rows, weights, codes, hops, strict=True)
    ]


# code_M = [1, 2, 1, 3], two choices per row, two experts:
#   first_M   [1, 0, 1, 1]      a new row begins
#   begin_M   [0, 0, 2, 3]      where the choice's row begins
#   slot_M    [0, 1, 2, 4]      row * 2 + place within the row
#   experts   [[0, 1], [0, none], [1, none]]
def _unpack(
    code_M: torch.Tensor, weights_M: torch.Tensor, num_rows: int, num_choices: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and the chosen experts of each row, [U, K]; `num_experts` is none."""
    first_M = code_M % 2
    place_M = torch.arange(len(code_M), device=code_M.device)
    # The largest begin so far: that of the choice's own row.
    begin_M = (place_M * first_M).cummax(0).values
    slot_M = (first_M.cumsum(0) - 1) * num_choices + place_M - begin_M
    # To distinct slots, so nothing depends on the order. Slots without a choice keep no expert and weight 0.
    experts_A = slot_M.new_full((num_rows * num_choices,), num_experts).scatter_(0, slot_M, code_M.long() // 2)
    weights_A = weights_M.new_zeros(num_rows * num_choices).scatter(0, slot_M, weights_M)
    return weights_A.view(-1, num_choices), experts_A.view(-1, num_choices)
