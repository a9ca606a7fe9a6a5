"""The live process groups of this rank, made from a `Topology` and registered with DeepSpeed.

DeepSpeed keeps its groups in module dictionaries that ZeRO, the engine and its own MoE layer read. Filling them from
the one `Topology` is what makes gradient reduction, partitioning and token dispatch agree.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from dsmoe.config.errors import UserError
from dsmoe.parallel.distributed import join_processes
from dsmoe.plan.topology import AXES, Axis, Topology


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that hold one copy of all experts, as the MoE layer sees them.

    `same_node[r]` says whether the r-th rank of the group is on this rank's node; it only sorts traffic by link.
    `label` names the layer that exchanges over the group, for messages. `levels` are, where tokens go first across
    nodes and then inside one, the groups of this rank for either; the group's ranks then stand node by node.
    """

    handle: dist.ProcessGroup | None
    size: int
    rank: int
    same_node: tuple[bool, ...]
    label: str = "an MoE layer"
    levels: tuple[ExpertGroup, ExpertGroup] | None = None

    @classmethod
    def alone(cls) -> ExpertGroup:
        """The group of a single process without `torch.distributed`."""
        return cls(None, 1, 0, (True,))

    @classmethod
    def registered(cls, name: str) -> ExpertGroup:
        """The expert group that DeepSpeed knows under `name` (`ep_size_N`)."""
        handle = deepspeed_groups._get_expert_parallel_group(name)
        ranks = dist.get_process_group_ranks(handle)
        # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
        here = dist.get_rank() // per_node
        return cls(
            handle,
            len(ranks),
            dist.get_group_rank(handle, dist.get_rank()),
            tuple(r // per_node == here for r in ranks),
        )


class Groups:
    """One process group per axis of the topology, for this rank.

    Making it is collective: every rank of the world must do so, in the same order as its other group-making calls. A
    process that has not joined the others yet does so first (`join_processes`, on CUDA where there is a device).

    Args:
        topology: the intent; its `world_size` must be the number of processes that were started.
        timeout: how long a collective of any of these groups may wait.

    Raises:
        UserError: the world that was launched is not the topology's.
    """

    def __init__(self, topology: Topology, timeout: timedelta = timedelta(minutes=30)) -> None:
        if not dist.is_initialized():
            join_processes("cuda" if torch.cuda.is_available() else "cpu", timeout)
        if topology.world_size != dist.get_world_size():
            raise UserError(
                f"cluster.nodes x cluster.devices_per_node = {topology.nodes} x {topology.devices_per_node} = "
                f"{topology.world_size} ranks, but the launcher started {dist.get_world_size()}; "
                f"start as many processes as the config describes, or set the two keys to what is there"
            )
        if topology.tensor > 1 or topology.expert_tensor > 1:
            raise UserError("parallel.tensor and parallel.expert_tensor above 1 cannot be trained in this version")
        self.topology = topology
        self.rank = dist.get_rank()
        self._handles = {axis: _new_group_of(topology, axis, self.rank, timeout) for axis in AXES}
        self._levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        if levels := topology.exchange_levels():
            across, inside = (_own_group(groups, self.rank, timeout) for groups in levels)
            self._levels = across, inside
        self._register_with_deepspeed()

    def handle(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of `axis` (one of `dsmoe.plan.topology.AXES`) that this rank is in."""
        return self._handles[axis]

    def coordinate(self, axis: Axis) -> int:
        """This rank's place within its group of `axis`."""
        return self.topology.coordinate(axis, self.rank)

    @property
    def expert_group_name(self) -> str:
        """The name under which DeepSpeed knows the expert groups, and expert parameters name theirs."""
        return f"ep_size_{self.topology.expert}"

    def expert_group(self, layer: str | None = None) -> ExpertGroup:
        """The expert group, with the nodes of its members, for the layer called `layer`."""
        topology = self.topology
        here = topology.node_of(self.rank)
        same_node = tuple(topology.node_of(r) == here for r in topology.group_of("expert", self.rank))
        label = f"layer {layer}" if layer else ExpertGroup.label
        levels = self._exchange_levels(label)
        return ExpertGroup(self.handle("expert"), topology.expert, self.coordinate("expert"), same_node, label, levels)

    def _exchange_levels(self, label: str) -> tuple[ExpertGroup, ExpertGroup] | None:
        if self._levels is None:
            return None

        def level(handle: dist.ProcessGroup, near: bool) -> ExpertGroup:
            size, rank = dist.get_world_size(handle), dist.get_group_rank(handle, self.rank)
            return ExpertGroup(handle, size, rank, tuple(near or place == rank for place in range(size)), label)

        across, inside = self._levels
        return level(across, near=False), level(inside, near=True)

    def _register_with_deepspeed(self) -> None:
        name, topology, rank = self.expert_group_name, self.topology, self.rank
        registry = deepspeed_groups
        registry._EXPERT_PARALLEL_GROUP[name] = self.handle("expert")
        registry._EXPERT_PARALLEL_GROUP_RANKS[name] = list(topology.group_of("expert", rank))
        registry._EXPERT_DATA_PARALLEL_GROUP[name] = self.handle("expert_data")
        registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(topology.group_of("expert_data", rank))
        # Without tensor parallelism the data group is the whole world, which DeepSpeed keeps a clone of.
        registry._WORLD_GROUP = self.handle("data")


def _new_group_of(topology: Topology, axis: Axis, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    return _own_group(topology.groups(axis), rank, timeout)


def _own_group(groups: Sequence[Sequence[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make every group, as torch wants of every rank, and return the one that has `rank` in it."""
    mine = None
    for ranks in groups:
        handle = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            mine = handle
    assert mine is not None
    return mine
