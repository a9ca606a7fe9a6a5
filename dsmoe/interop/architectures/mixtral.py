"""Mixtral: softmax scores, weights of a token's experts that add up to 1, experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Devices
from dsmoe.interop.architectures.architecture import Architecture, Experts
from dsmoe.interop.architectures.parts import HAS_EXPERTS, SOFTMAX, Count, Need, Settings, activation_of
from dsmoe.interop.names import Names
from dsmoe.plan.layers import dense_layers


def _settings(config: Config) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "intermediate_size": config.moe.expert_ffn_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": None,
    }


def _section(settings: Settings) -> dict[str, Any]:
    return {
        "num_experts": settings["num_local_experts"],
        "top_k": settings["num_experts_per_tok"],
        "expert_ffn_size": settings["intermediate_size"],
        "activation": activation_of(settings),
        "router": {"normalize_weights": True},
    }


def _misfits(config: Config) -> Iterator[str]:
    if 0 < len(dense_layers(config)) < config.model.num_layers:
        yield (
            f"model.dense_layers ({config.model.dense_layers}) and model.moe_every ({config.model.moe_every}) must be "
            f"0 and 1: all of its layers have experts"
        )


MIXTRAL = Architecture(
    name="mixtral",
    class_name="MixtralForCausalLM",
    settings=_settings,
    names=Names("block_sparse_moe", ("w1", "w3", "w2")),
    keys={"num_local_experts": Count, "num_experts_per_tok": Devices},
    needs=(
        *HAS_EXPERTS,
        *SOFTMAX,
        Need("moe.router.normalize_weights", (True,), "the weights of a token's experts add up to 1"),
    ),
    misfits=_misfits,
    experts=Experts(layers=lambda settings: list(range(settings["num_hidden_layers"])), section=_section),
)
