"""The exchange in two levels: to other nodes one row per token and node, which is handed on inside the node.

Both levels are the same hop. A rank has source rows, each with some chosen experts. It sends every destination that
has any of a row's experts one copy of the row, and for each of these choices its weight and a code: which expert, and
whether it is the first of a row. So the receiver has source rows with chosen experts again. The first hop is among the
ranks of equal place in their nodes, to nodes; the second among the ranks of a node. The experts take a source row once
per choice and return one sum per source row. The way home is the way out, backwards: what the ranks of a node return
for a row is summed there before it travels on, and so are its gradients.

How many rows and choices travel in either hop is told to all ranks at once, and read on the host once.

Shape suffixes: see `dsmoe.moe.dispatch`; M choices in the order in which they travel, N nodes, P ranks of a node; V
what is told about a node: rows, rows for each of its ranks, choices for each of its ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmoe.moe.balance import count_experts
from dsmoe.moe.capacity import Assignments, by_chunk, chunk_of_tokens
from dsmoe.moe.dispatch import (
    Arrival,
    Dispatch,
    Dispatched,
    LocalDispatch,
    OverRanks,
    PaddedDispatch,
    VariableDispatch,
    WayHome,
    cut,
    in_chunks,
)
from dsmoe.moe.permutation import RowMap, gather_rows, gather_weights
from dsmoe.parallel.collectives import Exchange, InFlight, Traffic, Transfer, exchange_counts, start_all_to_all
from dsmoe.parallel.groups import ExpertGroup
from dsmoe.parallel.shape_check import agree


def choose_dispatch(group: ExpertGroup, padded: bool, num_chunks: int) -> Dispatch:
    """The way to exchange tokens over `group`; `padded` where a capacity is set and static shapes are wanted."""
    if group.size == 1:
        return LocalDispatch()
    if group.levels is not None:
        return HierarchicalDispatch(group, num_chunks)
    return PaddedDispatch(group, num_chunks) if padded else VariableDispatch(group, num_chunks)


class HierarchicalDispatch(OverRanks):
    """Only kept rows travel, one for each token and node, then one for each of these and rank.

    A chunk is a run of tokens. Not padded: a buffer that is sure to have room for a node's rows would be as large as
    without this.
    """

    def dispatch(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, assignments: Assignments) -> list[Arrival]:
        """See `Dispatch.dispatch`; S = what the ranks of this node hand on to this one."""
        assert self.group.levels is not None
        num_chunks, num_nodes = self.num_chunks, self.group.levels[0].size
        num_experts, experts_TK = assignments.assigned_E.numel(), assignments.kept_experts()
        rank_experts = num_experts // self.group.size
        agree(self.group, x_TD, num_experts, f"top {assignments.num_choices}, in two levels{in_chunks(num_chunks)}")
        hops = self._plan(experts_TK // rank_experts)
        across = [hop for hop, _ in hops]
        # The experts of one chunk and node follow each other, so chunk and node together are the destination.
        own_TK = by_chunk(experts_TK, num_experts, num_chunks)
        parcels = _pack(own_TK, num_chunks * num_experts, num_experts // num_nodes, across)
        flights = _send(x_TD, weights_TK, parcels, across)
        return [
            _Relay(flight, inside, WayHome(parcels.rows, outside.rows), assignments.num_choices, rank_experts)
            for flight, (outside, inside) in zip(flights, hops, strict=True)
        ]

    def _plan(self, rank_TK: torch.Tensor) -> list[tuple[_Hop, _Hop]]:
        """How much travels across nodes and inside this one, for each chunk; R is no rank."""
        assert self.group.levels is not None
        across, inside = self.group.levels
        places, mine = inside.size, inside.rank
        told_HNV = _count(rank_TK, self.num_chunks, across.size, places)
        told_NPHV = told_HNV.transpose(0, 1)[:, None].expand(-1, places, -1, -1)
        heard = exchange_counts(told_NPHV.flatten(), self.group).view(across.size, places, self.num_chunks, -1)
        heard_HNV = heard[:, mine].transpose(0, 1)  # from those who send to this rank across nodes
        heard_HPV = heard.sum(0).transpose(0, 1)  # of what each rank of this node then has
        rows, choices = slice(1, 1 + places), slice(1 + places, None)
        outside_HN = [
            told_HNV[..., 0],
            heard_HNV[..., 0],
            told_HNV[..., choices].sum(-1),
            heard_HNV[..., choices].sum(-1),
        ]
        passed_on_HV = heard_HPV[:, mine]
        inside_HP = [
            passed_on_HV[:, rows],
            heard_HPV[..., 1 + mine],
            passed_on_HV[:, choices],
            heard_HPV[..., 1 + places + mine],
        ]
        # The one host read of this dispatch: sent and received rows, sent and received choices, by chunk and peer.
        counts = torch.cat([torch.stack(outside_HN), torch.stack(inside_HP)], dim=-1).transpose(0, 1).tolist()
        return [
            (
                _Hop.of(across, self.traffic, [by_peer[: across.size] for by_peer in chunk]),
                _Hop.of(inside, self.traffic, [by_peer[across.size :] for by_peer in chunk]),
            )
            for chunk in counts
        ]


@dataclass(frozen=True)
class _Hop:
    """The exchanges of one chunk at one level."""

    rows: Exchange
    choices: Exchange

    @classmethod
    def of(cls, group: ExpertGroup, traffic: Traffic, counts: list[list[int]]) -> _Hop:
        return cls(Exchange(group, traffic, *counts[:2]), Exchange(group, traffic, *counts[2:]))


@dataclass(frozen=True)
class _Parcels:
    """Which row each destination gets of each source row, and in which order the choices travel, with their codes."""

    rows: RowMap
    choices: RowMap
    code_M: torch.Tensor


@dataclass(frozen=True)
class _Flight:
    """Rows, weights and codes of one chunk on one level."""

    rows: InFlight
    weights: InFlight
    codes: Transfer

    def wait(self, num_choices: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [S, D], and their weights and experts [S, K], of which there are `num_experts` here."""
        rows_SD, weights_M, code_M = self.rows.wait(), self.weights.wait()[:, 0], self.codes.wait()[:, 0]
        return rows_SD, *_unpack(code_M, weights_M, len(rows_SD), min(num_choices, num_experts), num_experts)


@dataclass(frozen=True)
class _Relay:
    """An `Arrival`: hands on what has come from other nodes, and waits for what the ranks of this node hand on.

    `num_choices` is K, `rank_experts` L.
    """

    flight: _Flight
    inside: _Hop
    home: WayHome
    num_choices: int
    rank_experts: int

    def __call__(self) -> Dispatched:
        node_experts = self.rank_experts * self.inside.rows.group.size
        rows_SD, weights_SK, experts_SK = self.flight.wait(self.num_choices, node_experts)
        parcels = _pack(experts_SK, node_experts, self.rank_experts, [self.inside])
        (flight,) = _send(rows_SD, weights_SK, parcels, [self.inside])
        rows_SD, weights_SK, experts_SK = flight.wait(self.num_choices, self.rank_experts)
        local = Assignments.of(experts_SK, self.rank_experts)
        ends_L = local.kept_E.cumsum(0)
        row_map = RowMap.of(local, ends_L - local.kept_E, sum(self.inside.choices.receive_counts or ()))
        relay = WayHome(parcels.rows, self.inside.rows)
        return Dispatched(rows_SD, weights_SK, row_map, ends_L.int(), self.home, relay)


def _count(rank_TK: torch.Tensor, num_chunks: int, num_nodes: int, places: int) -> torch.Tensor:
    """What this rank has for each node, [H, N, V]."""
    num_ranks = num_nodes * places
    visits_TR = torch.zeros(len(rank_TK), num_ranks + 1, dtype=torch.int32, device=rank_TK.device)
    visits_TNP = visits_TR.scatter_(1, rank_TK, 1)[:, :num_ranks].view(-1, num_nodes, places)
    visits_TNV = torch.cat([visits_TNP.amax(-1, keepdim=True), visits_TNP], dim=-1)
    chunk_T = chunk_of_tokens(len(rank_TK), num_chunks, rank_TK.device)
    rows_HNV = visits_TNV.new_zeros(num_chunks, *visits_TNV.shape[1:]).index_add_(0, chunk_T, visits_TNV)
    choices_A = count_experts(by_chunk(rank_TK, num_ranks, num_chunks), num_chunks * num_ranks)
    choices_HNP = choices_A.view(num_chunks, num_nodes, places)
    return torch.cat([rows_HNV.long(), choices_HNP], dim=-1)


def _pack(experts_SK: torch.Tensor, num_experts: int, per_destination: int, hops: list[_Hop]) -> _Parcels:
    """Sort rows and choices by destination, which has experts that follow each other; `num_experts` is none."""
    num_rows, num_choices = map(sum, _sent(hops))
    to = Assignments.of(experts_SK // per_destination, num_experts // per_destination)
    source_A = to.order_A // to.num_choices
    first_A = to.kept_A.clone()  # of the choices of a row for a destination, which stand together
    first_A[1:] &= (source_A[1:] != source_A[:-1]) | (to.expert_A[1:] != to.expert_A[:-1])
    row_A = torch.where(first_A, first_A.cumsum(0) - 1, num_rows)
    order_M = to.order_A[:num_choices]
    code_M = experts_SK.flatten()[order_M] % per_destination * 2 + first_A[:num_choices]
    return _Parcels(
        RowMap.placed(to.order_A, row_A, to.num_choices, num_rows, complete=False),
        RowMap.of(to, to.kept_E.cumsum(0) - to.kept_E, num_choices),
        code_M.int(),
    )


def _sent(hops: list[_Hop]) -> tuple[list[int], list[int]]:
    """How many rows and choices leave in each hop."""
    return [sum(hop.rows.send_counts or ()) for hop in hops], [sum(hop.choices.send_counts or ()) for hop in hops]


def _send(source_SD: torch.Tensor, weights_SK: torch.Tensor, parcels: _Parcels, hops: list[_Hop]) -> list[_Flight]:
    """Let the parcels of each chunk leave."""
    num_rows, num_choices = _sent(hops)
    rows = cut(gather_rows(source_SD, parcels.rows), num_rows)
    weights = cut(gather_weights(weights_SK, parcels.choices)[:, None], num_choices)
    codes = cut(parcels.code_M[:, None], num_choices)
    return [
        _Flight(
            start_all_to_all(rows_ND, hop.rows), start_all_to_all(weights_M1, hop.choices), hop.choices.start(codes_M1)
        )
        for rows_ND, weights_M1, codes_M1, hop in zip(rows, weights, codes, hops, strict=True)
    ]


def _unpack(
    code_M: torch.Tensor, weights_M: torch.Tensor, num_rows: int, num_choices: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the chosen experts (E is none) of each row, [S, K]."""
    first_M = code_M % 2
    place_M = torch.arange(len(code_M), device=code_M.device)
    begin_M = (place_M * first_M).cummax(0).values
    slot_M = (first_M.cumsum(0) - 1) * num_choices + place_M - begin_M
    experts_A = slot_M.new_full((num_rows * num_choices,), num_experts).scatter_(0, slot_M, code_M.long() // 2)
    weights_A = weights_M.new_zeros(num_rows * num_choices).scatter(0, slot_M, weights_M)
    return weights_A.view(-1, num_choices), experts_A.view(-1, num_choices)
