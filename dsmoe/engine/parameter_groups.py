"""The optimizer's parameter groups, as ZeRO and weight decay need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: dense and expert parameters, each with and without weight decay, of one dtype each.

    Vectors (norms, biases) are not decayed. Expert groups carry `moe` and the name of their process group, by which
    ZeRO finds it; since they do, DeepSpeed neither merges nor cuts them (it would lose the decay, and leave an empty
    group before a stacked parameter of more than 178,956,971 elements). ZeRO flattens a group into one buffer and
    takes the first parameter's dtype for the model's, so the fp32 routers of a bf16 model are a group, and the last.
    What is cut over the tensor group is apart as well (`split`), for `clip_gradients`: the fp32 copies that DeepSpeed
    puts into the groups at stage 0 do not say so themselves.
    """
    groups: dict[tuple[str | None, bool, bool, torch.dtype], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            expert_group = getattr(parameter, "group_name", None)
            split = getattr(parameter, "tensor_model_parallel", False)
            groups.setdefault((expert_group, split, parameter.dim() >= 2, parameter.dtype), []).append(parameter)
    # Stable: groups of one dtype stay in the order of the model, the same on every rank.
    in_order = sorted(groups.items(), key=lambda item: item[0][3].itemsize)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "moe": expert_group is not None,
            "split": split,
            # ZeRO looks up expert groups by this name (0.19.8, runtime/zero/stage_1_and_2.py:880).
            "name": expert_group or ("matrices" if decayed else "vectors"),
        }
        for (expert_group, split, decayed, _), parameters in in_order
    ]
