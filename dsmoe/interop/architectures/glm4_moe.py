"""GLM-4-MoE: DeepSeek-V3's routing beside grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Devices, PositiveFloat, Width
from dsmoe.interop.architectures.architecture import Architecture, Experts
from dsmoe.interop.architectures.parts import HAS_EXPERTS, Count, LayerIndex, Need, Settings, activation_of
from dsmoe.interop.names import Names
from dsmoe.plan.layers import dense_layers


def _settings(config: Config) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    rotary = {"rope_type": "default", "rope_theta": config.model.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "intermediate_size": config.model.ffn_size or moe.expert_ffn_size,
        "moe_intermediate_size": moe.expert_ffn_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": (moe.shared_expert_ffn_size or 0) // moe.expert_ffn_size,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.normalize_weights,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.top_k_groups,
        "first_k_dense_replace": len(dense_layers(config)),
        "use_qk_norm": config.model.qk_norm,
        "num_nextn_predict_layers": 0,
        "rope_parameters": rotary,
        "partial_rotary_factor": 1.0,
    }


def _section(settings: Settings) -> dict[str, Any]:
    width, num_shared = settings["moe_intermediate_size"], settings["n_shared_experts"]
    return {
        "num_experts": settings["n_routed_experts"],
        "top_k": settings["num_experts_per_tok"],
        "expert_ffn_size": width,
        "activation": activation_of(settings),
        "router": {
            "normalize_weights": bool(settings["norm_topk_prob"]),
            "score": "sigmoid",
            "scale": float(settings["routed_scaling_factor"]),
            "num_groups": settings["n_group"],
            "top_k_groups": settings["topk_group"],
        },
        **({"shared_expert_ffn_size": num_shared * width} if num_shared else {}),
        "balance": {"bias_update_rate": 0.001},
    }


def _moe_layers(settings: Settings) -> list[int]:
    return list(range(settings["num_hidden_layers"])[settings["first_k_dense_replace"] :])


def _misfits(config: Config) -> Iterator[str]:
    moe, dense = config.moe, dense_layers(config)
    if moe is None:
        return
    if dense != list(range(len(dense))):
        yield (
            f"model.moe_every ({config.model.moe_every}) must be 1: dense layers ({', '.join(map(str, dense))}) are "
            f"its first ones"
        )
    if moe.router.num_groups > 1 and moe.router.group_score != "top2_sum":
        yield (
            f"moe.router.group_score ({moe.router.group_score}) must be top2_sum: a group is worth its best two experts"
        )
    if (moe.shared_expert_ffn_size or 0) % moe.expert_ffn_size:
        yield (
            f"moe.shared_expert_ffn_size ({moe.shared_expert_ffn_size}) must be a multiple of moe.expert_ffn_size "
            f"({moe.expert_ffn_size}): its shared expert is as wide as a number of others"
        )


GLM4_MOE = Architecture(
    name="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    settings=_settings,
    names=Names(shared="shared_experts", bias="gate.e_score_correction_bias"),
    keys={
        "n_routed_experts": Count,
        "num_experts_per_tok": Devices,
        "moe_intermediate_size": Width,
        "norm_topk_prob": bool,
        "n_shared_experts": Count,
        "routed_scaling_factor": PositiveFloat,
        "n_group": Devices,
        "topk_group": Devices,
        "first_k_dense_replace": LayerIndex,
    },
    qk_norm=None,
    needs=(*HAS_EXPERTS, Need("moe.router.score", ("sigmoid",), "its scores are sigmoids")),
    misfits=_misfits,
    experts=Experts(layers=_moe_layers, section=_section),
)
