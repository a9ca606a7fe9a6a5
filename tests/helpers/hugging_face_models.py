"""Small models as checkpoints, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from dsmoe import build_model
from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.schema import Config
from dsmoe.interop.tensors import ChunkedTensor, LazyChunk, Tensors
from dsmoe.interop.weights import write_checkpoint
from dsmoe.parallel.sharding import Box
from tests.helpers.checkpoint_runs import take_steps
from tests.helpers.small_runs import make_trainer, small_config

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
    return {key: chunked(tensor) for key, tensor in tensors.items()}


def chunked(tensor: torch.Tensor) -> ChunkedTensor:
    return ChunkedTensor(tensor.dtype, tuple(tensor.shape), [LazyChunk(Box.whole(tensor.shape), lambda: tensor)])


def save(config: Config, checkpoint: Path) -> Tensors:
    """A checkpoint of random weights."""
    tensors = random_tensors(config)
    checkpoint.mkdir(parents=True)
    write_checkpoint(checkpoint, config, tensors, "a test")
    return tensors


COMMON = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 3e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
    "eos_token_id": 256,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
THEIRS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "qwen3_moe": {**MOE, "num_experts": 4, "decoder_sparse_step": 2, "norm_topk_prob": False},
    "glm4_moe": {
        **MOE,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 1.0},
    },
    "llama": {},
    "mistral": {"sliding_window": 40, "tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
}


def save_theirs(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """A model of transformers' own making, whose norms and biases matter."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(name, **{**COMMON, **THEIRS[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(settings)
    for key, tensor in model.state_dict().items():
        if "norm" in key or key.endswith("bias"):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    model.to(dtype).save_pretrained(folder)


def load_sections(text: str) -> dict[str, Any]:
    # `make_config` has a width of dense layers, which not all of these have.
    found = yaml.safe_load(text)
    return {"model": {"ffn_size": None, **found["model"]}, "moe": found["moe"]}


def train_on(config: Config) -> list[float]:
    trainer = make_trainer(config)
    trainer.take_weights(Path(config.checkpoint.weights_from or ""))
    return take_steps(trainer, 3)["losses"]
