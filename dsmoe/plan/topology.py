"""The process groups of a run as plain integers, for 8 devices or 100,000.

Rank order (Megatron-Core's parallel folding, arXiv:2504.14960): the dense layers see a grid with tensor fastest, then
data; the expert layers see the SAME ranks as another grid with expert_tensor fastest, then expert, then expert_data.
A group is an arithmetic progression of ranks, so nothing here searches:

    axis           stride                   degree
    tensor         1                        tensor
    data           tensor                   world / tensor
    expert_tensor  1                        expert_tensor
    expert         expert_tensor            expert
    expert_data    expert_tensor * expert   world / (expert_tensor * expert)
    exchange       1                        expert_tensor * expert

An exchange group is a copy of all experts, every slice of each: the ranks among which tokens travel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Cluster, Config, Parallel
from dsmoe.config.sections.parallel import LAYOUT_RULES, AllToAll

Axis = Literal["tensor", "data", "expert_tensor", "expert", "expert_data", "exchange"]

AXES: tuple[Axis, ...] = get_args(Axis)

RankGroups = tuple[tuple[int, ...], ...]
"""Disjoint groups of ranks: ranks ascending, groups in order of their first rank."""


@dataclass(frozen=True)
class Topology:
    """The layout of a run's ranks; rank r is device `r % devices_per_node` of node `r // devices_per_node`.

    Raises:
        UserError: what the sections `cluster` and `parallel` would be refused for: a degree does not divide the number
            of devices, or nodes have unequal parts of a copy of the experts in a hierarchical exchange.
    """

    nodes: int
    devices_per_node: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    all_to_all: AllToAll = "flat"

    def __post_init__(self) -> None:
        cluster = Cluster(nodes=self.nodes, devices_per_node=self.devices_per_node)
        parallel = Parallel(
            tensor=self.tensor, expert=self.expert, expert_tensor=self.expert_tensor, all_to_all=self.all_to_all
        )
        problems = [message for rule in LAYOUT_RULES for _, message in rule(cluster, parallel)]
        if problems:
            raise UserError("\n".join(problems))

    @classmethod
    def from_config(cls, config: Config) -> Topology:
        """Lay `config.parallel` over the devices of `config.cluster`."""
        return cls(
            nodes=config.cluster.nodes,
            devices_per_node=config.cluster.devices_per_node,
            tensor=config.parallel.tensor,
            expert=config.parallel.expert,
            expert_tensor=config.parallel.expert_tensor,
            all_to_all=config.parallel.all_to_all,
        )

    @property
    def world_size(self) -> int:
        """Number of devices, and of ranks."""
        return self.nodes * self.devices_per_node

    @property
    def data(self) -> int:
        """Ranks that read different data and hold the same dense parameters."""
        return self.world_size // self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.exchange

    @property
    def exchange(self) -> int:
        """Ranks that together hold one copy of all experts."""
        return self.expert * self.expert_tensor

    def degree(self, axis: Axis) -> int:
        """Return the number of ranks in each of the axis' groups."""
        degree: int = getattr(self, axis)
        return degree

    def stride(self, axis: Axis) -> int:
        """Return the distance between neighbours in a group."""
        strides = {"data": self.tensor, "expert": self.expert_tensor, "expert_data": self.exchange}
        return strides.get(axis, 1)

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """Return every group of the axis: ranks ascending, groups in order of their first rank."""
        stride, degree = self.stride(axis), self.degree(axis)
        span = stride * degree
        return tuple(
            tuple(range(first, first + span, stride))
            for block in range(0, self.world_size, span)
            for first in range(block, block + stride)
        )

    def group_of(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Return the axis' group that `rank` is in, ranks ascending."""
        stride, degree = self.stride(axis), self.degree(axis)
        first = rank - self.coordinate(axis, rank) * stride
        return tuple(range(first, first + stride * degree, stride))

    def coordinate(self, axis: Axis, rank: int) -> int:
        """Return the place of `rank` in its group: `group_of(axis, rank)[coordinate] == rank`."""
        return self._checked(rank) // self.stride(axis) % self.degree(axis)

    def node_of(self, rank: int) -> int:
        """Return the node that `rank` runs on."""
        return self._checked(rank) // self.devices_per_node

    def nodes_spanned(self, axis: Axis) -> int:
        """Return over how many nodes a group of the axis is spread; where its groups differ, the most."""
        stride, degree, per_node = self.stride(axis), self.degree(axis), self.devices_per_node
        # Groups begin at every rank of `block * span + range(stride)`. The blocks' places within their nodes are the
        # multiples of `step`, and the group that begins nearest to the end of its node reaches the furthest.
        step = math.gcd(stride * degree, per_node)
        latest_begin = per_node - step + min(stride, step) - 1
        reached = (latest_begin + stride * (degree - 1)) // per_node + 1
        return min(degree, reached)  # neighbours more than a node apart pass over nodes

    def exchange_levels(self) -> tuple[RankGroups, RankGroups] | None:
        """Return the groups of the two levels of a hierarchical exchange; None where tokens are exchanged in one.

        Across: the ranks of equal place in their nodes, among those that hold one copy of the experts. Inside: the
        ranks of one node. Where a copy fits into a node there is nothing to do in two levels.
        """
        copy, per_node = self.exchange, self.devices_per_node
        if self.all_to_all == "flat" or copy <= per_node:
            return None
        across = tuple(
            tuple(range(first, block + copy, per_node))
            for block in range(0, self.world_size, copy)
            for first in range(block, block + per_node)
        )
        inside = tuple(tuple(range(first, first + per_node)) for first in range(0, self.world_size, per_node))
        return across, inside

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not among the {self.world_size} ranks of {self}")
        return rank
