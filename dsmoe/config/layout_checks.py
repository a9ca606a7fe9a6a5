"""What must hold between the cluster, the degrees of parallelism and what they cut."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe.config.errors import Problem
from dsmoe.config.nearest import divisors_of, nearest_of, neighbours
from dsmoe.config.schema import Config


def world_size(config: Config) -> int:
    """Return the number of ranks: one for each device."""
    return config.cluster.nodes * config.cluster.devices_per_node


def _tensor_layout(config: Config) -> Iterator[Problem]:
    tensor, world = config.parallel.tensor, world_size(config)
    if world % tensor:
        nearest = nearest_of(tensor, divisors_of(world))
        yield (
            "parallel.tensor",
            f"parallel.tensor ({tensor}) must divide the number of devices ({_world(config)}); nearest: {nearest}",
        )
    if config.parallel.sequence and tensor == 1:
        yield (
            "parallel.sequence",
            "parallel.sequence (true) would be unused: parallel.tensor is 1; remove it or raise parallel.tensor",
        )


def _tensor_slices(config: Config) -> Iterator[Problem]:
    """Check that tensor ranks get equal parts of all that is cut."""
    model, tensor = config.model, config.parallel.tensor
    num_kv_heads = model.num_kv_heads or model.num_heads
    sizes = {
        "model.num_heads": model.num_heads,
        "model.vocab_size": model.vocab_size,
        "train.sequence_length": config.train.sequence_length,
    }
    if model.ffn_size is not None:
        sizes["model.ffn_size"] = model.ffn_size
    if config.moe is not None and config.moe.shared_expert_ffn_size is not None:
        sizes["moe.shared_expert_ffn_size"] = config.moe.shared_expert_ffn_size
    if config.moe is not None and config.moe.residual:
        sizes["moe.expert_ffn_size"] = config.moe.expert_ffn_size
    for key, size in sizes.items():
        if size % tensor:
            larger = -(-size // tensor) * tensor
            yield key, f"{key} ({size}) must be a multiple of parallel.tensor ({tensor}); the next is {larger}"
    if num_kv_heads % tensor and tensor % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) and parallel.tensor ({tensor}): one must divide the other, so that "
            f"every rank has equally many key/value heads",
        )


def _expert_layout(config: Config) -> Iterator[Problem]:
    key, expert, inner = "parallel.expert", config.parallel.expert, config.parallel.expert_tensor
    world = world_size(config)
    fitting = [degree for degree in divisors_of(world) if world % (degree * inner) == 0]
    if config.moe is None:
        if expert > 1:
            yield key, f"parallel.expert ({expert}) needs experts, but moe is null; set parallel.expert: 1 or give moe"
        if inner > 1:
            yield (
                "parallel.expert_tensor",
                f"parallel.expert_tensor ({inner}) needs experts, but moe is null; set parallel.expert_tensor: 1",
            )
    elif config.moe.num_experts % expert:
        num_experts = config.moe.num_experts
        divisors = divisors_of(num_experts)
        message = f"parallel.expert ({expert}) must divide moe.num_experts ({num_experts})"
        yield key, f"{message}; nearest: {nearest_of(expert, divisors)}{_also_fits(expert, divisors, fitting, world)}"
    if world % (expert * inner):
        product = f"{expert} * {inner} = {expert * inner}"
        remedy = (
            f"nearest parallel.expert: {nearest_of(expert, fitting)}" if fitting else "lower parallel.expert_tensor"
        )
        yield (
            key,
            f"parallel.expert * parallel.expert_tensor ({product}) must divide the number of devices "
            f"({_world(config)}); {remedy}",
        )


def _all_to_all(config: Config) -> Iterator[Problem]:
    """Check that nodes have equal parts of a copy of the experts where tokens go through every node's ranks alike."""
    parallel, per_node = config.parallel, config.cluster.devices_per_node
    copy = parallel.expert * parallel.expert_tensor
    if parallel.all_to_all == "hierarchical" and copy % per_node and per_node % copy:
        product = f"{parallel.expert} * {parallel.expert_tensor} = {copy}"
        yield (
            "parallel.all_to_all",
            f"parallel.all_to_all (hierarchical) wants a copy of the experts to be on whole nodes, or within one: "
            f"parallel.expert * parallel.expert_tensor ({product}) must be a multiple or a divisor of "
            f"cluster.devices_per_node ({per_node}); change one of them, or set parallel.all_to_all: flat",
        )


def _world(config: Config) -> str:
    cluster = config.cluster
    return f"{cluster.nodes} nodes x {cluster.devices_per_node} = {world_size(config)}"


def _also_fits(expert: int, divisors: list[int], fitting: list[int], world: int) -> str:
    """Name a degree that suits the devices too, where the nearest divisors of num_experts do not."""
    both = [degree for degree in divisors if degree in fitting]
    if not both or set(both) & set(neighbours(expert, divisors)):
        return ""
    best = min(both, key=lambda degree: abs(degree - expert))
    return f" ({best} divides the {world} devices as well)"


LAYOUT_CHECKS = (_tensor_layout, _tensor_slices, _expert_layout, _all_to_all)
