"""`Plan`: a config and all that follows from it, derived once; printed by `dsmoe plan` as text or JSON.

Groups, data, model, engine, checkpointer, meter and trainer take what they need from one `Plan`. No module below
derives a topology, a batch, a device or a count of its own: `tests/plan/test_derived_once.py` looks for those that do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property

from dsmoe.config.schema import Config
from dsmoe.plan.batch import Batch
from dsmoe.plan.devices import DeviceFacts, resolve_device
from dsmoe.plan.flops import Flops, flops_per_token
from dsmoe.plan.layers import num_moe_layers
from dsmoe.plan.parameters import DeviceParameters, ParameterCounts, count_parameters
from dsmoe.plan.text import first_and_last, quantity, table
from dsmoe.plan.topology import AXES, Topology


@dataclass(frozen=True)
class GroupsOfAxis:
    """The process groups of one axis, all alike; `range(0, size * stride, stride)` is the first."""

    name: str
    size: int
    """Ranks in each group."""
    count: int
    """Groups."""
    stride: int
    """Distance between neighbours in a group."""
    nodes: int
    """Nodes that a group is spread over; where groups differ, the most."""

    @property
    def first(self) -> range:
        """The ranks of the group that rank 0 is in."""
        return range(0, self.size * self.stride, self.stride)


@dataclass(frozen=True)
class HeldExperts:
    """The experts of each MoE layer that one rank holds."""

    rank: int
    first: int
    """The first one's number in its layer."""
    last: int
    """The last one's number: the rank holds all between."""
    slice: int
    """Its slice of each expert, of `parallel.expert_tensor`."""

    def explain(self, num_slices: int) -> str:
        """Write it in words: `experts 0 to 7`, with `slice 1 of 2` where experts are cut."""
        experts = f"expert {self.first}" if self.first == self.last else f"experts {self.first} to {self.last}"
        return experts if num_slices == 1 else f"{experts}, slice {self.slice + 1} of {num_slices}"


@dataclass(frozen=True)
class Plan:
    """A config and everything that follows from it by arithmetic."""

    config: Config
    """The run on the ranks that train it."""
    given: Config
    """The config as its user wrote it: `config` itself, unless `cluster.elastic` fitted that to the ranks."""
    device: DeviceFacts | None
    """The accelerator that `cluster.device` names; None where nobody has said."""
    batch: Batch
    parameters: ParameterCounts
    flops: Flops
    """Per token, of sequences of `train.sequence_length`."""

    @classmethod
    def from_config(cls, config: Config, given: Config | None = None) -> Plan:
        """Do the arithmetic for a config that `load_config` has checked; `given` where it was fitted to the ranks.

        Raises:
            UserError: `cluster.device` is no known device.
        """
        parameters = count_parameters(config)
        return cls(
            config=config,
            given=given or config,
            device=resolve_device(config.cluster.device),
            batch=Batch.from_config(config),
            parameters=parameters,
            flops=flops_per_token(config, parameters),
        )

    @property
    def topology(self) -> Topology:
        """The layout of the ranks: the world of this run."""
        return self.batch.topology

    @property
    def is_on_cpu(self) -> bool:
        """True where the run trains on CPUs, over gloo: `cluster.device` is `cpu`."""
        return self.device is not None and self.device.name == "cpu"

    @property
    def device_type(self) -> str:
        """The type of the ranks' devices as torch names it: `cpu` or `cuda`."""
        return "cpu" if self.is_on_cpu else "cuda"

    @property
    def collective_timeout(self) -> timedelta:
        """The longest that a collective of training waits: `cluster.collective_timeout_seconds`."""
        return timedelta(seconds=self.config.cluster.collective_timeout_seconds)

    @cached_property
    def per_device(self) -> DeviceParameters:
        """The parameters that one device holds."""
        return self.parameters.per_device(self.topology)

    @cached_property
    def groups(self) -> tuple[GroupsOfAxis, ...]:
        """The groups of each axis in the order of `AXES`; after them the two levels of a hierarchical exchange."""
        return _groups(self.topology)

    @cached_property
    def held_by_first_node(self) -> tuple[HeldExperts, ...]:
        """The experts of each rank of node 0; empty for a dense model."""
        return _held_by_first_node(self.config, self.topology)

    @property
    def headline(self) -> str:
        """One line that names the run, its world and its model: `tiny: world size 8 (2 nodes x 4 devices), ...`."""
        config, topology = self.config, self.topology
        layout = f"{quantity(topology.nodes, 'node')} x {quantity(topology.devices_per_node, 'device')}"
        experts = f"top {config.moe.top_k} of {config.moe.num_experts} experts" if config.moe else "dense"
        size = f"world size {topology.world_size} ({layout})"
        return f"{config.name}: {size}, {config.model.num_layers} layers, {experts}"

    def introduction(self) -> list[str]:
        """Write the lines with which a run begins: parameters, ranks, batch."""
        topology, counts, parallel = self.topology, self.parameters, self.config.parallel
        cut = " (sequence cut)" if parallel.sequence else ""
        return [
            f"parameters: {counts.total:,} total, {counts.active:,} active per token",
            f"ranks: {topology.world_size} = {topology.data} data x {topology.tensor} tensor{cut}; "
            f"experts: {topology.expert} expert x {topology.expert_tensor} expert-tensor x "
            f"{topology.expert_data} expert-data; ZeRO stage {parallel.zero_stage}",
            f"batch: {self.batch.explain()}",
        ]

    def text(self) -> str:
        """Write the plan for a person."""
        lines = [self.headline, *self.introduction(), "", *self._groups_table(), ""]
        if self.held_by_first_node:
            lines += [*self._experts_table(), ""]
        return "\n".join([*lines, *self._parameters_table(), "", self._flops_line()])

    def json(self) -> dict[str, object]:
        """Return the plan as JSON values; counts are exact and ranks are numbers."""
        topology, batch, parameters = self.topology, self.batch, self.parameters
        degrees: dict[str, int] = {axis: topology.degree(axis) for axis in AXES}
        return {
            "name": self.config.name,
            "ranks": {
                "total": topology.world_size,
                "nodes": topology.nodes,
                "devices_per_node": topology.devices_per_node,
                **degrees,
            },
            "groups": {
                groups.name: {
                    "size": groups.size,
                    "count": groups.count,
                    "stride": groups.stride,
                    "nodes": groups.nodes,
                }
                for groups in self.groups
            },
            "experts_of_first_node": [asdict(held) for held in self.held_by_first_node],
            "batch": {
                "data_ranks": topology.data,
                "micro_batch_size": batch.micro_batch_size,
                "sequence_length": batch.sequence_length,
                "accumulation_steps": batch.accumulation_steps,
                "steps": batch.steps,
                "tokens_per_step": batch.tokens_per_step,
                "total_tokens": batch.total_tokens,
            },
            "parameters": {
                "total": parameters.total,
                "active": parameters.active,
                "parts": {
                    part: {"total": total, "active": active} for part, (total, active) in parameters.parts().items()
                },
                "per_device": {**asdict(self.per_device), "total": self.per_device.total},
            },
            "flops_per_token": {
                "forward": self.flops.forward,
                "training": self.flops.training,
                "causal_training": self.flops.causal_training,
            },
        }

    def _groups_table(self) -> list[str]:
        rows = [["process groups", "size", "groups", "stride", "nodes", "the first"]]
        for groups in self.groups:
            stride = f"{groups.stride:,}" if groups.size > 1 else "-"
            numbers = (f"{groups.size:,}", f"{groups.count:,}", stride, f"{groups.nodes:,}")
            rows.append([f"  {groups.name}", *numbers, " ".join(first_and_last(groups.first))])
        return [*table(rows, "<>>>><"), *self._exchange_line()]

    def _exchange_line(self) -> list[str]:
        """Say where tokens travel; nothing for a dense model."""
        topology = self.topology
        if not self.held_by_first_node:
            return []
        if topology.exchange == 1:
            return ["every rank holds all experts: no token travels"]
        nodes = topology.nodes_spanned("exchange")
        where = "inside a node" if nodes == 1 else f"over {nodes} nodes ({topology.all_to_all})"
        return [f"tokens travel among the {topology.exchange} ranks of an exchange group, {where}"]

    def _experts_table(self) -> list[str]:
        assert self.config.moe is not None
        topology, num_experts = self.topology, self.config.moe.num_experts
        layers = quantity(num_moe_layers(self.config), "MoE layer")
        heading = f"experts on the first node, of {num_experts} in each of {layers}"
        rows = [(f"rank {held.rank}", held.explain(topology.expert_tensor)) for held in self.held_by_first_node]
        return [heading, *(f"  {line}" for line in first_and_last(table(rows, "<<"), shown=8))]

    def _parameters_table(self) -> list[str]:
        counts, held = self.parameters, self.per_device
        rows = [["parameters", "total", "active"]]
        for part, (total, active) in counts.parts().items():
            if total:
                rows.append([f"  {part}", f"{total:,}", f"{active:,}"])
        rows.append(["  all", f"{counts.total:,}", f"{counts.active:,}"])
        return [
            *table(rows, "<>>"),
            f"each device holds {held.total:,} = {held.shared:,} shared + {held.experts:,} of experts",
        ]

    def _flops_line(self) -> str:
        length = self.config.train.sequence_length
        return (
            f"FLOPs per token, in sequences of {length:,}: "
            f"{self.flops.forward:,} forward, {self.flops.training:,} forward and backward "
            f"({self.flops.causal_training:,} with causal attention counted half, as Megatron-LM does)"
        )


def _groups(topology: Topology) -> tuple[GroupsOfAxis, ...]:
    groups = [
        GroupsOfAxis(
            name=axis,
            size=topology.degree(axis),
            count=topology.world_size // topology.degree(axis),
            stride=topology.stride(axis),
            nodes=topology.nodes_spanned(axis),
        )
        for axis in AXES
    ]
    if levels := topology.exchange_levels():
        across, inside = map(len, levels)
        per_node = topology.devices_per_node
        size = topology.world_size // across
        groups.append(GroupsOfAxis("exchange_across", size, across, stride=per_node, nodes=size))
        groups.append(GroupsOfAxis("exchange_inside", per_node, inside, stride=1, nodes=1))
    return tuple(groups)


def _held_by_first_node(config: Config, topology: Topology) -> tuple[HeldExperts, ...]:
    if config.moe is None:
        return ()
    per_rank = config.moe.num_experts // topology.expert
    held = []
    for rank in range(topology.devices_per_node):
        first = topology.coordinate("expert", rank) * per_rank
        held.append(HeldExperts(rank, first, first + per_rank - 1, topology.coordinate("expert_tensor", rank)))
    return tuple(held)
