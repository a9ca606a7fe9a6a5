"""Live process groups of this rank, made from a `Topology` and registered with DeepSpeed.

DeepSpeed keeps its groups in module dictionaries that ZeRO, the engine and its own MoE layer read. They are filled from
the one `Topology`, so that gradient reduction, partitioning and token dispatch agree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.engine import deepspeed_registry
from dsmoe.plan.topology import AXES, Axis, Topology
from dsmoe.runtime.consistency import check_all_ranks_agree
from dsmoe.runtime.processes import join_processes
from dsmoe.runtime.world import launched_world

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold one copy of all experts, as the MoE layer sees them.

    Attributes:
        handle: torch's group; None for a single process.
        size: R.
        rank: this rank's place in the group.
        same_node: True for each rank of the group on this rank's node; only sorts traffic by link.
        label: the layer that exchanges over the group, for messages.
        levels: this rank's groups across nodes and inside its node, where tokens are exchanged in two levels; the
            group's ranks then stand node by node.
    """

    handle: dist.ProcessGroup | None
    size: int
    rank: int
    same_node: tuple[bool, ...]
    label: str = "an MoE layer"
    levels: tuple[ExpertGroup, ExpertGroup] | None = None

    @classmethod
    def alone(cls) -> ExpertGroup:
        """Make the group of a single process without `torch.distributed`."""
        return cls(None, 1, 0, (True,))

    @classmethod
    def registered(cls, name: str) -> ExpertGroup:
        """Return the expert group that DeepSpeed knows under `name` (`ep_size_N`)."""
        handle = deepspeed_registry.expert_group(name)
        ranks = dist.get_process_group_ranks(handle)
        world = launched_world()
        # One node if the launcher does not say: nothing but the sorting of traffic depends on it.
        per_node = world.devices_per_node or world.size
        node = dist.get_rank() // per_node
        return cls(
            handle,
            len(ranks),
            dist.get_group_rank(handle, dist.get_rank()),
            tuple(r // per_node == node for r in ranks),
        )


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share the dense weights and, with `sequence`, cut the sequence between the blocks."""

    handle: dist.ProcessGroup | None
    size: int
    rank: int
    sequence: bool = False

    @classmethod
    def alone(cls) -> TensorGroup:
        """Make the group of a rank with whole weights."""
        return cls(None, 1, 0)

    @property
    def over_sequence(self) -> TensorGroup:
        """The same ranks, each with its slice of the sequence: for weights that are used between the blocks."""
        return self if self.sequence else TensorGroup.alone()


def _topology_fingerprint(topology: Topology) -> dict[str, str]:
    """Return a topology by the config keys that describe it, for the comparison between ranks."""
    sections = {"nodes": "cluster", "devices_per_node": "cluster"}
    return {f"{sections.get(name, 'parallel')}.{name}": str(value) for name, value in asdict(topology).items()}


class Groups:
    """One process group per axis of the topology, for this rank.

    Construction is collective: every rank of the world must take part, in the same order as its other group-making
    calls. A process that has not joined the others yet joins first (`join_processes`, on CUDA where there is a device).

    Args:
        topology: the intent; its `world_size` must be the number of processes that were started.
        timeout: of every collective of these groups.

    Raises:
        RankMismatchError: a rank has another topology than rank 0; on all of them.
        UserError: the world that was launched is not the topology's.
    """

    def __init__(self, topology: Topology, timeout: timedelta = timedelta(minutes=30)) -> None:
        if not dist.is_initialized():
            join_processes("cuda" if torch.cuda.is_available() else "cpu", timeout)
        check_all_ranks_agree(
            _topology_fingerprint(topology)
        )  # else ranks would wait in groups that others do not make
        if topology.world_size != dist.get_world_size():
            raise UserError(
                f"cluster.nodes x cluster.devices_per_node = {topology.nodes} x {topology.devices_per_node} = "
                f"{topology.world_size} ranks, but the launcher started {dist.get_world_size()}; "
                f"start as many processes as the config describes, or set the two keys to what is there"
            )
        self.topology = topology
        self.rank = dist.get_rank()
        # Where experts are whole, the expert groups are the exchange groups: one communicator serves both.
        made: list[Axis] = [axis for axis in AXES if axis != "expert" or topology.expert_tensor > 1]
        # In the order of AXES on every rank: torch makes groups one after the other, with all ranks.
        self._handles = {axis: _own_group(topology.groups(axis), self.rank, timeout, axis) for axis in made}
        self._handles.setdefault("expert", self._handles["exchange"])
        self._levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        if levels := topology.exchange_levels():
            across, inside = (
                _own_group(groups, self.rank, timeout, name)
                for groups, name in zip(levels, ("across nodes", "inside a node"), strict=True)
            )
            self._levels = across, inside
        elif topology.all_to_all == "hierarchical":
            _LOGGER.info("parallel.all_to_all: hierarchical is flat here: no copy of the experts is on several nodes")
        # Now, since DeepSpeed makes groups of its own where it finds none.
        self.register_with_deepspeed()

    def handle(self, axis: Axis) -> dist.ProcessGroup:
        """Return this rank's process group of `axis` (one of `dsmoe.plan.topology.AXES`)."""
        return self._handles[axis]

    def coordinate(self, axis: Axis) -> int:
        """Return this rank's place within its group of `axis`."""
        return self.topology.coordinate(axis, self.rank)

    @property
    def expert_group_name(self) -> str:
        """The name under which DeepSpeed knows the exchange groups, and expert parameters name theirs."""
        return f"ep_size_{self.topology.expert}"

    def expert_group(self, layer: str | None = None) -> ExpertGroup:
        """Return the ranks that the layer called `layer` exchanges tokens over: they hold all slices of all experts."""
        topology = self.topology
        node = topology.node_of(self.rank)
        ranks = topology.group_of("exchange", self.rank)
        same_node = tuple(topology.node_of(r) == node for r in ranks)
        label = f"layer {layer}" if layer else ExpertGroup.label
        return ExpertGroup(
            self.handle("exchange"),
            len(ranks),
            self.coordinate("exchange"),
            same_node,
            label,
            self._exchange_levels(label),
        )

    def _exchange_levels(self, label: str) -> tuple[ExpertGroup, ExpertGroup] | None:
        if self._levels is None:
            return None

        # Only sorts traffic: across nodes everyone but the rank itself is far, inside a node everyone is near.
        def level(handle: dist.ProcessGroup, near: bool) -> ExpertGroup:
            size, rank = dist.get_world_size(handle), dist.get_group_rank(handle, self.rank)
            return ExpertGroup(handle, size, rank, tuple(near or place == rank for place in range(size)), label)

        across, inside = self._levels
        return level(across, near=False), level(inside, near=True)

    def tensor_group(self, sequence: bool = False) -> TensorGroup:
        """Return the tensor group; `sequence` cuts the sequence between the blocks (`parallel.sequence`)."""
        degree = self.topology.tensor
        return TensorGroup(self.handle("tensor"), degree, self.coordinate("tensor"), sequence and degree > 1)

    @property
    def mpu(self) -> ModelParallelUnit | None:
        """The `mpu` argument of `deepspeed.initialize`; None without tensor parallelism."""
        return ModelParallelUnit(self) if self.topology.tensor > 1 else None

    def register_with_deepspeed(self) -> None:
        """Register these groups with DeepSpeed, instead of those of an earlier topology of this process."""
        topology = self.topology

        def member(axis: Axis) -> deepspeed_registry.RegisteredGroup:
            return deepspeed_registry.RegisteredGroup(self.handle(axis), topology.group_of(axis, self.rank))

        # Without tensor parallelism the data group is the whole world.
        world = self.handle("data") if topology.tensor == 1 else None
        deepspeed_registry.register_groups(
            self.expert_group_name,
            expert=member("exchange"),
            expert_data=member("expert_data"),
            mpu=self.mpu,
            world=world,
        )


class ModelParallelUnit:
    """The tensor and data groups under the names by which DeepSpeed asks Megatron's `mpu` for them."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor group."""
        return self._groups.handle("tensor")

    def get_model_parallel_rank(self) -> int:
        """This rank's place in its tensor group."""
        return self._groups.coordinate("tensor")

    def get_model_parallel_world_size(self) -> int:
        """The tensor degree."""
        return self._groups.topology.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the same dense weights."""
        return self._groups.handle("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Those ranks in the world."""
        return list(self._groups.topology.group_of("data", self._groups.rank))

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._groups.coordinate("data")

    def get_data_parallel_world_size(self) -> int:
        """The data degree."""
        return self._groups.topology.data


def _own_group(groups: Sequence[Sequence[int]], rank: int, timeout: timedelta, name: str) -> dist.ProcessGroup:
    """Make every group, as torch requires of every rank, and return the one of `rank`.

    The flight recorder shows the groups by `name`.
    """
    own = None
    # Also those that this rank is not in: `new_group` is collective over the world.
    for ranks in groups:
        handle = dist.new_group(list(ranks), timeout=timeout, group_desc=name)
        if rank in ranks:
            own = handle
    assert own is not None
    return own
