"""The kind of each layer of the model, and shapes that follow from others in the config."""

from __future__ import annotations

from dsmoe.config.schema import Config, Model


def is_moe_layer(config: Config, index: int) -> bool:
    """Return whether layer `index` (from 0) is an MoE layer: after the dense ones, the last of each `moe_every`."""
    sparse_index = index - config.model.dense_layers
    return config.moe is not None and sparse_index >= 0 and (sparse_index + 1) % config.model.moe_every == 0


def num_moe_layers(config: Config) -> int:
    """Return how many layers are MoE layers."""
    return sum(is_moe_layer(config, index) for index in range(config.model.num_layers))


def dense_layers(config: Config) -> list[int]:
    """Return the layers that are not MoE layers."""
    return [layer for layer in range(config.model.num_layers) if not is_moe_layer(config, layer)]


def head_dim(model: Model) -> int:
    """Return the width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_heads


def num_kv_heads(model: Model) -> int:
    """Return how many key/value heads the query heads share."""
    return model.num_kv_heads or model.num_heads
