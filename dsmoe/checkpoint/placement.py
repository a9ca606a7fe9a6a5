"""Where every weight of this rank is in the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dsmoe.moe.experts import StackedExperts
from dsmoe.moe.layer import MoE
from dsmoe.parallel.sharding import Placement


def placements(model: nn.Module) -> dict[str, Placement]:
    """For every parameter, by its name on this rank, its pieces of the model that one rank alone would have.

    Experts go by their global id: the first dimension of a stack, or the number in the name of a module of a user's.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: _dense(name, parameter, modules) for name, parameter in model.named_parameters()}
    for path, layer in modules.items():
        if isinstance(layer, MoE):
            found.update(_experts(f"{path}.deepspeed_moe.experts".removeprefix("."), layer))
    return found


def _dense(name: str, parameter: torch.Tensor, modules: dict[str, nn.Module]) -> Placement:
    owner, _, last = name.rpartition(".")
    shard = getattr(modules[owner], "shard", None) if last == "weight" else None
    return Placement.whole(name, parameter) if shard is None else Placement.cut(name, parameter, shard)


def _experts(path: str, layer: MoE) -> Iterator[tuple[str, Placement]]:
    experts, (first, slice_index) = layer.experts, layer.expert_place
    if isinstance(experts, StackedExperts):
        stacks = {"gate_up": experts.gate_up, "down": experts.down}
        for (last, stack), shard in zip(stacks.items(), experts.shards(slice_index), strict=True):
            name = f"{path}.{last}"
            one = Placement.cut(name, stack, replace(shard, dim=shard.dim + 1))
            yield name, one.stacked(first, layer.num_experts)
        return
    for local, expert in enumerate(experts.deepspeed_experts):
        for last, parameter in expert.named_parameters():
            there = f"{path}.deepspeed_experts.{first + local}.{last}"
            yield f"{path}.deepspeed_experts.{local}.{last}", Placement.whole(there, parameter)
