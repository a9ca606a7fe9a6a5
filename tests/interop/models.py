"""Small models as checkpoints, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsmoe import build_model
from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.schema import Config
from dsmoe.interop.tensors import Tensors, Tile, Tiled
from dsmoe.interop.weights import write_checkpoint
from dsmoe.parallel.boxes import Box
from tests.train.layouts import small_config

MIXTRAL: dict[str, Any] = {
    "model": {"dense_layers": 0, "ffn_size": None, "rope_theta": 5e4, "norm_eps": 1e-6},
    "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24},
}
QWEN3_MOE: dict[str, Any] = {
    "model": {"qk_norm": True, "num_layers": 4, "moe_every": 2, "head_dim": 16, "tie_embeddings": True},
    "moe": {"num_experts": 8, "top_k": 3, "expert_ffn_size": 16, "router": {"normalize_weights": False}},
}
GLM4_MOE: dict[str, Any] = {
    "model": {"qk_norm": True, "num_layers": 3},
    "moe": {
        "num_experts": 8,
        "top_k": 3,
        "expert_ffn_size": 16,
        "shared_expert_ffn_size": 32,
        "router": {"score": "sigmoid", "scale": 2.5, "num_groups": 4, "top_k_groups": 2},
        "balance": {"bias_update_rate": 0.001},
    },
}
LLAMA: dict[str, Any] = {"model": {"ffn_size": 48}, "moe": None}
QWEN3: dict[str, Any] = {"model": {"ffn_size": 48, "qk_norm": True, "tie_embeddings": True}, "moe": None}


def moe_model(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One of the above with other options: `model={...}`, `moe={...}`, `router={...}`, `balance={...}`."""
    moe = {**base["moe"], **changes.get("moe", {})}
    for section in ("router", "balance", "capacity"):
        moe[section] = {**moe.get(section, {}), **changes.get(section, {})}
    return {"model": {**base["model"], **changes.get("model", {})}, "moe": moe}


def make_config(folder: Path, sections: dict[str, Any], **others: Any) -> Config:
    return small_config(folder, **sections, **others)


def random_tensors(config: Config) -> Tensors:
    """Weights that all matter: norms are not 1, and selection biases not 0."""
    generator = torch.Generator().manual_seed(1)
    model = build_model(config)
    tensors = {f"{MODEL}/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"{BUFFER}/{name}": x for name, x in model.named_buffers() if name.endswith("balance.bias")}
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.add_(noise, alpha=0.3 if "norm" in key or key.startswith(BUFFER) else 0.05)
    return {key: tiled(tensor) for key, tensor in tensors.items()}


def tiled(tensor: torch.Tensor) -> Tiled:
    return Tiled(tensor.dtype, tuple(tensor.shape), [Tile(Box.all_of(tensor.shape), lambda: tensor)])


def save(config: Config, checkpoint: Path) -> Tensors:
    """A checkpoint of random weights."""
    tensors = random_tensors(config)
    checkpoint.mkdir(parents=True)
    write_checkpoint(checkpoint, config, tensors, "a test")
    return tensors
