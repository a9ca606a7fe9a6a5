"""Qwen3-MoE: softmax scores, normed queries and keys, dense layers anywhere."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Devices, Layers, Width
from dsmoe.interop.architectures.architecture import Architecture, Experts
from dsmoe.interop.architectures.parts import HAS_EXPERTS, SOFTMAX, Count, LayerIndex, Settings, activation_of
from dsmoe.plan.layers import dense_layers


def _settings(config: Config) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    return {
        "intermediate_size": config.model.ffn_size or moe.expert_ffn_size,
        "moe_intermediate_size": moe.expert_ffn_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(config),
        "use_sliding_window": False,
    }


def _section(settings: Settings) -> dict[str, Any]:
    return {
        "num_experts": settings["num_local_experts"],
        "top_k": settings["num_experts_per_tok"],
        "expert_ffn_size": settings["moe_intermediate_size"],
        "activation": activation_of(settings),
        "router": {"normalize_weights": bool(settings["norm_topk_prob"])},
    }


def _moe_layers(settings: Settings) -> list[int]:
    every, dense = settings["decoder_sparse_step"], settings["mlp_only_layers"] or ()
    layers = range(settings["num_hidden_layers"])
    return [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    settings=_settings,
    keys={
        "num_local_experts": Count,
        "num_experts_per_tok": Devices,
        "moe_intermediate_size": Width,
        "norm_topk_prob": bool,
        "decoder_sparse_step": Layers,
    },
    optional_keys={
        "num_experts": Count,  # transformers reads it from a file and calls it num_local_experts
        "mlp_only_layers": Annotated[list[LayerIndex], Field(max_length=10_000)],
    },
    qk_norm=True,
    needs=(*HAS_EXPERTS, *SOFTMAX),
    experts=Experts(layers=_moe_layers, section=_section),
)
