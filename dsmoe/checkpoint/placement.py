"""The place of every weight of a rank in the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dsmoe.moe.experts import StackedExperts
from dsmoe.moe.layer import MoE
from dsmoe.parallel.sharding import ShardedTensor


def sharded_tensors(model: nn.Module) -> dict[str, ShardedTensor]:
    """Describe every parameter, by its name on this rank, as boxes of the model that one rank alone would have.

    Experts go by their global id: the first dimension of a stack, or the number in the name of a user's module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: _dense(name, parameter, modules) for name, parameter in model.named_parameters()}
    for path, layer in modules.items():
        if isinstance(layer, MoE):
            found.update(_experts(f"{path}.deepspeed_moe.experts".removeprefix("."), layer))
    return found


def _dense(name: str, parameter: torch.Tensor, modules: dict[str, nn.Module]) -> ShardedTensor:
    owner, _, last = name.rpartition(".")
    shard = getattr(modules[owner], "shard", None) if last == "weight" else None
    return ShardedTensor.replicated(name, parameter) if shard is None else ShardedTensor.sliced(name, parameter, shard)


def _experts(path: str, layer: MoE) -> Iterator[tuple[str, ShardedTensor]]:
    experts, (first, slice_index) = layer.experts, layer.expert_place
    if isinstance(experts, StackedExperts):
        stacks = {"gate_up": experts.gate_up, "down": experts.down}
        for (last, stack), shard in zip(stacks.items(), experts.shards(slice_index), strict=True):
            name = f"{path}.{last}"
            # `shard` cuts the matrix of one expert; in the stack, dimension 0 is the expert.
            sharded = ShardedTensor.sliced(name, stack, replace(shard, dim=shard.dim + 1))
            yield name, sharded.stacked(first, layer.num_experts)
        return
    for local, expert in enumerate(experts.deepspeed_experts):
        for last, parameter in expert.named_parameters():
            global_name = f"{path}.deepspeed_experts.{first + local}.{last}"
            yield f"{path}.deepspeed_experts.{local}.{last}", ShardedTensor.replicated(global_name, parameter)
