"""The section `parallel`: the layout of the model over the devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import Devices, NoEffect, Section, whole_number
from dsmoe.config.suggestions import divisors_of, nearest_of, neighbours

if TYPE_CHECKING:
    from dsmoe.config.sections.cluster import Cluster
    from dsmoe.config.sections.model import Model
    from dsmoe.config.sections.moe import Moe
    from dsmoe.config.sections.train import Train


AllToAll = Literal["flat", "hierarchical"]


class Parallel(Section):
    """The layout of the model over the devices; the data degrees follow from it."""

    tensor: NoEffect[Devices] = 1
    """Devices that share one copy of the dense weights, each holding a slice of every matrix."""
    expert: NoEffect[Devices] = 1
    """Devices over which the experts of a layer are spread; divides `moe.num_experts`."""
    expert_tensor: NoEffect[Devices] = 1
    """Devices that share one expert, each holding a slice of its matrices."""
    sequence: NoEffect[bool] = False
    """With `tensor`: between the blocks, each of its devices holds a slice of the sequence instead of all of it."""
    all_to_all: NoEffect[AllToAll] = "flat"
    """Exchange of tokens with other nodes: `flat` sends one row for every choice, `hierarchical` one per node and
    token, which is handed on inside the node. No difference if all experts of a layer are within one node."""
    overlap_chunks: NoEffect[Devices] = 1
    """Parts into which a micro-batch's exchange is cut, so that experts work on one part while others travel."""
    zero_stage: NoEffect[Annotated[Literal[0, 1, 2], BeforeValidator(whole_number)]] = 1
    """ZeRO stage of DeepSpeed: shards nothing (0), optimizer states (1), gradients as well (2) over the data group."""


def world_size(cluster: Cluster) -> int:
    """Return the number of ranks, one per device."""
    return cluster.nodes * cluster.devices_per_node


def tensor_degree_problems(cluster: Cluster, parallel: Parallel) -> Iterator[Problem]:
    """Check that the tensor degree divides the number of devices."""
    if world_size(cluster) % parallel.tensor:
        nearest = nearest_of(parallel.tensor, divisors_of(world_size(cluster)))
        yield (
            "parallel.tensor",
            f"parallel.tensor ({parallel.tensor}) must divide the number of devices ({_devices(cluster)}); "
            f"nearest: {nearest}",
        )


def expert_degree_problems(cluster: Cluster, parallel: Parallel) -> Iterator[Problem]:
    """Check that the devices hold whole copies of the experts: `expert * expert_tensor` divides their number."""
    expert, slices = parallel.expert, parallel.expert_tensor
    if world_size(cluster) % (expert * slices):
        key, degree, fitting = "parallel.expert", expert, _fitting_degrees(cluster, parallel)
        if not fitting:  # no expert degree fits: suggest another degree of slicing
            key, degree, fitting = "parallel.expert_tensor", slices, divisors_of(world_size(cluster))
        yield (
            key,
            f"parallel.expert * parallel.expert_tensor ({expert} * {slices} = {expert * slices}) must divide the "
            f"number of devices ({_devices(cluster)}); nearest {key}: {nearest_of(degree, fitting)}",
        )


def exchange_problems(cluster: Cluster, parallel: Parallel) -> Iterator[Problem]:
    """Check, for the hierarchical exchange, that a copy of the experts covers whole nodes or lies within one."""
    per_node, copy = cluster.devices_per_node, parallel.expert * parallel.expert_tensor
    if parallel.all_to_all == "hierarchical" and copy % per_node and per_node % copy:
        product = f"{parallel.expert} * {parallel.expert_tensor} = {copy}"
        yield (
            "parallel.all_to_all",
            f"parallel.all_to_all (hierarchical) wants a copy of the experts to be on whole nodes, or within one: "
            f"parallel.expert * parallel.expert_tensor ({product}) must be a multiple or a divisor of "
            f"cluster.devices_per_node ({per_node}); change one of them, or set parallel.all_to_all: flat",
        )


LAYOUT_RULES = (tensor_degree_problems, expert_degree_problems, exchange_problems)
"""Rules between degrees and devices alone, for any model."""


def sequence_problems(parallel: Parallel) -> Iterator[Problem]:
    """Check that sequence parallelism has tensor ranks to split the sequence over."""
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence",
            "parallel.sequence (true) would be unused: parallel.tensor is 1; remove it or raise parallel.tensor",
        )


def uneven_problems(sizes: Mapping[str, int | None], tensor: int) -> Iterator[Problem]:
    """Check that `tensor` divides each size, given by key; a size of None is skipped."""
    for key, size in sizes.items():
        if size is not None and size % tensor:
            larger = -(-size // tensor) * tensor
            yield key, f"{key} ({size}) must be a multiple of parallel.tensor ({tensor}); the next is {larger}"


def tensor_slice_problems(parallel: Parallel, model: Model, train: Train) -> Iterator[Problem]:
    """Check that tensor ranks get equal slices of heads, vocabulary, sequence and dense blocks."""
    tensor = parallel.tensor
    num_kv_heads = model.num_kv_heads or model.num_heads
    sizes = {
        "model.num_heads": model.num_heads,
        "model.vocab_size": model.vocab_size,
        "train.sequence_length": train.sequence_length,
        "model.ffn_size": model.ffn_size,
    }
    yield from uneven_problems(sizes, tensor)
    if num_kv_heads % tensor and tensor % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) and parallel.tensor ({tensor}): one must divide the other, so that "
            f"every rank has equally many key/value heads",
        )


def spread_problems(cluster: Cluster, parallel: Parallel, moe: Moe | None) -> Iterator[Problem]:
    """Check that the model has experts to spread, equally many on each rank."""
    key, expert, slices = "parallel.expert", parallel.expert, parallel.expert_tensor
    if moe is None:
        if expert > 1:
            yield key, f"parallel.expert ({expert}) needs experts, but moe is null; set parallel.expert: 1 or give moe"
        if slices > 1:
            yield (
                "parallel.expert_tensor",
                f"parallel.expert_tensor ({slices}) needs experts, but moe is null; set parallel.expert_tensor: 1",
            )
    elif moe.num_experts % expert:
        divisors = divisors_of(moe.num_experts)
        message = f"parallel.expert ({expert}) must divide moe.num_experts ({moe.num_experts})"
        yield key, f"{message}; nearest: {nearest_of(expert, divisors)}{_also_fits(divisors, cluster, parallel)}"


def _devices(cluster: Cluster) -> str:
    return f"{cluster.nodes} nodes x {cluster.devices_per_node} = {world_size(cluster)}"


def _fitting_degrees(cluster: Cluster, parallel: Parallel) -> list[int]:
    """Return the expert degrees with which the devices hold whole copies of the experts."""
    world = world_size(cluster)
    return [degree for degree in divisors_of(world) if world % (degree * parallel.expert_tensor) == 0]


def _also_fits(divisors: list[int], cluster: Cluster, parallel: Parallel) -> str:
    """Return the end of a message: a degree that fits the devices too, if none of the nearest divisors does."""
    expert, fitting = parallel.expert, _fitting_degrees(cluster, parallel)
    both = [degree for degree in divisors if degree in fitting]
    if not both or set(both) & set(neighbours(expert, divisors)):
        return ""
    best = min(both, key=lambda degree: abs(degree - expert))
    return f" ({best} divides the {world_size(cluster)} devices as well)"
