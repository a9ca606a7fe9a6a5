"""Initial weights: a function of the seed, the parameter's name and an expert's global id, never of the layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from dsmoe.config.schema import Config
from dsmoe.moe.layer import MoE
from dsmoe.parallel.random_weights import normal_from, seed_of

if TYPE_CHECKING:
    from dsmoe.model.transformer import Transformer


def initialise(model: Transformer, config: Config) -> None:
    """Fill every weight from N(0, init_std^2), in place; norms stay 1, and biases become 0.

    Projections that write into the residual stream (attention's `o_proj`, every `down`) are drawn with
    init_std / sqrt(2 * num_layers), so that the stream's variance does not grow with depth (GPT-2, sec. 2.3).
    """
    std, seed = config.model.init_std, config.train.seed
    residual_std = std / math.sqrt(2 * config.model.num_layers)
    for name, module in model.named_modules():
        if module is model.head and config.model.tie_embeddings:
            continue  # the embedding's weight, drawn under that name
        if name.endswith(".gate.wg"):
            continue  # the router's weight, drawn below
        if isinstance(module, nn.Linear | nn.Embedding):
            is_residual = name.endswith(("o_proj", "down"))
            shard = getattr(module, "shard", None)
            normal_from(seed_of(seed, name), module.weight, residual_std if is_residual else std, shard)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MoE):
            normal_from(seed_of(seed, name, "router"), module.router.weight, std)
            module.reset_experts(std, residual_std, seed=seed_of(seed, name, "experts"))
