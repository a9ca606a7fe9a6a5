"""DeepSpeed's registry of process groups: module variables of `deepspeed.utils.groups` (0.19.8), most of them private.

ZeRO, the engine and DeepSpeed's own MoE layer look up their groups in this registry, one for all engines of a process.
A leaf: layers below `dsmoe.engine` import this file, so it imports nothing of dsmoe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups


class RegisteredGroup(NamedTuple):
    """A process group of this rank and its members' global ranks."""

    handle: dist.ProcessGroup
    ranks: Sequence[int]


def register_groups(
    name: str,
    expert: RegisteredGroup,
    expert_data: RegisteredGroup,
    mpu: Any | None,
    world: dist.ProcessGroup | None,
) -> None:
    """Make these the groups that DeepSpeed finds, instead of those that were registered before.

    Args:
        name: the key of the expert groups (`ep_size_N`), which expert parameters carry as `group_name`.
        expert: the group over which DeepSpeed adds up the experts' norms: all slices of all experts.
        expert_data: the group over which expert gradients are averaged.
        mpu: Megatron's model parallel unit; None without tensor parallelism.
        world: the group of all ranks, which DeepSpeed otherwise keeps a clone of; None leaves that one.
    """
    deepspeed_groups.mpu = mpu
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = expert.handle
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(expert.ranks)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data.handle
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(expert_data.ranks)
    if world is not None:
        deepspeed_groups._WORLD_GROUP = world


def has_model_parallel_unit() -> bool:
    """Return whether DeepSpeed has been given tensor parallelism."""
    return deepspeed_groups.mpu is not None


def has_expert_group(name: str) -> bool:
    """Return whether an expert group is registered under `name`."""
    return name in deepspeed_groups._get_expert_parallel_group_dict()


def expert_group(name: str) -> dist.ProcessGroup:
    """Return the expert group that is registered under `name`.

    Raises:
        AssertionError: there is none.
    """
    return deepspeed_groups._get_expert_parallel_group(name)


def create_expert_groups(ep_size: int, data_before_expert: bool) -> None:
    """Make and register, by DeepSpeed, the expert and expert-data groups of `ep_size`; collective.

    Args:
        ep_size: ranks of an expert group.
        data_before_expert: lay data ranks before expert ranks (DeepSpeed's `use_data_before_expert_parallel_`).
    """
    deepspeed_groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
