"""The live process groups of this rank, made from a `Topology` and registered with DeepSpeed.

DeepSpeed keeps its groups in module dictionaries that ZeRO, the engine and its own MoE layer read. Filling them from
the one `Topology` is what makes gradient reduction, partitioning and token dispatch agree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from dsmoe.config.errors import UserError
from dsmoe.plan.topology import AXES, Axis, Topology
from dsmoe.runtime.consistency import check_all_ranks_agree
from dsmoe.runtime.processes import join_processes
from dsmoe.runtime.world import launched_world

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold one copy of all experts, as the MoE layer sees them.

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
        world = launched_world()
        per_node = world.devices_per_node or world.size
        here = dist.get_rank() // per_node
        return cls(
            handle,
            len(ranks),
            dist.get_group_rank(handle, dist.get_rank()),
            tuple(r // per_node == here for r in ranks),
        )


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share the dense weights, and whether they share the sequence between the blocks as well."""

    handle: dist.ProcessGroup | None
    size: int
    rank: int
    sequence: bool = False

    @classmethod
    def alone(cls) -> TensorGroup:
        """The group of a rank that has the weights for itself."""
        return cls(None, 1, 0)

    @property
    def over_sequence(self) -> TensorGroup:
        """The same ranks, each with its slice of the sequence: for weights that are used between the blocks."""
        return self if self.sequence else TensorGroup.alone()


def _topology_fingerprint(topology: Topology) -> dict[str, str]:
    """A topology by the keys that describe it."""
    sections = {"nodes": "cluster", "devices_per_node": "cluster"}
    return {f"{sections.get(name, 'parallel')}.{name}": str(value) for name, value in asdict(topology).items()}


class Groups:
    """One process group per axis of the topology, for this rank.

    Making it is collective: every rank of the world must do so, in the same order as its other group-making calls. A
    process that has not joined the others yet does so first (`join_processes`, on CUDA where there is a device).

    Args:
        topology: the intent; its `world_size` must be the number of processes that were started.
        timeout: how long a collective of any of these groups may wait.

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
        self._handles = {axis: _new_group_of(topology, axis, self.rank, timeout) for axis in made}
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
        self.register_with_deepspeed()

    def handle(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of `axis` (one of `dsmoe.plan.topology.AXES`) that this rank is in."""
        return self._handles[axis]

    def coordinate(self, axis: Axis) -> int:
        """This rank's place within its group of `axis`."""
        return self.topology.coordinate(axis, self.rank)

    @property
    def expert_group_name(self) -> str:
        """The name under which DeepSpeed knows the exchange groups, and expert parameters name theirs."""
        return f"ep_size_{self.topology.expert}"

    def expert_group(self, layer: str | None = None) -> ExpertGroup:
        """The ranks that the layer called `layer` exchanges tokens over: all slices of all experts are among them."""
        topology = self.topology
        here = topology.node_of(self.rank)
        ranks = topology.group_of("exchange", self.rank)
        same_node = tuple(topology.node_of(r) == here for r in ranks)
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

        def level(handle: dist.ProcessGroup, near: bool) -> ExpertGroup:
            size, rank = dist.get_world_size(handle), dist.get_group_rank(handle, self.rank)
            return ExpertGroup(handle, size, rank, tuple(near or place == rank for place in range(size)), label)

        across, inside = self._levels
        return level(across, near=False), level(inside, near=True)

    def tensor_group(self, sequence: bool = False) -> TensorGroup:
        """The tensor group; `sequence` cuts the sequence between the blocks (`parallel.sequence`)."""
        degree = self.topology.tensor
        return TensorGroup(self.handle("tensor"), degree, self.coordinate("tensor"), sequence and degree > 1)

    @property
    def mpu(self) -> ModelParallelUnit | None:
        """What `deepspeed.initialize` takes as `mpu`; None without tensor parallelism."""
        return ModelParallelUnit(self) if self.topology.tensor > 1 else None

    def register_with_deepspeed(self) -> None:
        """Make these the groups that DeepSpeed finds, instead of those of an earlier topology of this process."""
        name, topology, rank = self.expert_group_name, self.topology, self.rank
        registry = deepspeed_groups
        registry.mpu = self.mpu
        # Over this group DeepSpeed adds up the experts' norms: all slices of all experts.
        registry._EXPERT_PARALLEL_GROUP[name] = self.handle("exchange")
        registry._EXPERT_PARALLEL_GROUP_RANKS[name] = list(topology.group_of("exchange", rank))
        registry._EXPERT_DATA_PARALLEL_GROUP[name] = self.handle("expert_data")
        registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(topology.group_of("expert_data", rank))
        # Without tensor parallelism the data group is the whole world, which DeepSpeed keeps a clone of.
        if topology.tensor == 1:
            registry._WORLD_GROUP = self.handle("data")


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


def _new_group_of(topology: Topology, axis: Axis, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    return _own_group(topology.groups(axis), rank, timeout, axis)


def _own_group(groups: Sequence[Sequence[int]], rank: int, timeout: timedelta, name: str) -> dist.ProcessGroup:
    """Make every group, as torch wants of every rank, and return the one that has `rank` in it.

    The flight recorder knows them by `name`.
    """
    mine = None
    for ranks in groups:
        handle = dist.new_group(list(ranks), timeout=timeout, group_desc=name)
        if rank in ranks:
            mine = handle
    assert mine is not None
    return mine
