"""From a Hugging Face config to the `model` and `moe` sections that describe the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dsmoe.config.checks import cross_field_problems
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Moe
from dsmoe.interop.architectures import ARCHITECTURES, HIDDEN_ACT, MLA, Architecture, dense_layers
from dsmoe.plan.layers import head_dim, num_kv_heads

Settings = Mapping[str, Any]
"""A Hugging Face config with all of its defaults."""

_ANY_RUN: dict[str, Any] = {
    "name": "any",
    "data": {"sources": ({"name": "any", "path": "any"},), "tokenizer": "any.json"},
    "optimizer": {"lr": 1.0},
    "train": {"steps": 1, "batch_tokens": 1, "sequence_length": 1},
}
_ROUTER_KEYS = ("score", "normalize_weights", "scale", "num_groups", "top_k_groups", "group_score")


def architecture_of(settings: Settings) -> Architecture:
    """The one that a config is of.

    Raises:
        UserError: it is none that we can read.
    """
    name = settings.get("model_type")
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    reason = f": {MLA.partition('. ')[0]}" if name in ("deepseek_v2", "deepseek_v3") else ""
    raise UserError(f"model_type {name!r} cannot be read{reason}; these can: {', '.join(ARCHITECTURES)}")


def sections_of(settings: Settings) -> dict[str, Any]:
    """The `model` and `moe` sections, without what has our default.

    Raises:
        UserError: the model does something that ours cannot; with each key, value and what is needed.
    """
    problems = list(_misfits(settings))
    if problems:
        raise UserError("\n  ".join(["the model does what ours cannot:", *problems]))
    sparse = _moe_layers(settings)
    model: dict[str, Any] = {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["hidden_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "num_kv_heads": settings["num_key_value_heads"],
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
    }
    if sparse:
        first, every = _pattern(sparse, settings["num_hidden_layers"])
        model |= {"dense_layers": first, "moe_every": every}
    if len(sparse) < settings["num_hidden_layers"]:
        model["ffn_size"] = settings["intermediate_size"]
    window = settings.get("sliding_window") or settings["max_position_embeddings"]
    model |= {
        # Up to a window's length, attention within the window is attention.
        "max_sequence_length": min(window, settings["max_position_embeddings"]),
        "rope_theta": float(_rotary(settings)["rope_theta"]),
        "norm_eps": float(settings["rms_norm_eps"]),
        "qk_norm": settings["model_type"] in ("qwen3", "qwen3_moe") or bool(settings.get("use_qk_norm")),
        "tie_embeddings": bool(settings["tie_word_embeddings"]),
    }
    if settings["initializer_range"] > 0:  # 0 says nothing of a model that has been trained
        model["init_std"] = float(settings["initializer_range"])
    sections = {"model": model, "moe": _moe_section(settings) if sparse else None}
    problems = list(_unloadable(sections))
    if problems:
        raise UserError("\n  ".join(["the model does what ours cannot; as sections of ours:", *problems]))
    return sections


def _unloadable(sections: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the sections in any run's config."""
    try:
        config = Config.model_validate({**_ANY_RUN, **sections})
    except ValidationError as error:
        yield from (
            f"{'.'.join(map(str, found['loc']))} ({found['input']}): {found['msg']}" for found in error.errors()
        )
        return
    problems = cross_field_problems(config)
    yield from (message for key, message in problems if key.partition(".")[0] in sections)


def _misfits(settings: Settings) -> Iterator[str]:
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            yield f"{key} (true) must be false: our projections have no biases"
    rotary = _rotary(settings)
    kind, part = rotary.get("rope_type", "default"), rotary.get("partial_rotary_factor") or 1.0
    if kind != "default":
        yield f"rope_parameters.rope_type ({kind}) must be default: our rotary frequencies are not scaled"
    if part != 1.0:
        yield f"rope_parameters.partial_rotary_factor ({part}) must be 1: we rotate all of a head's vector"
    if "full_attention" not in (settings.get("layer_types") or ["full_attention"]):
        yield "layer_types must have full_attention"
    sparse, layers = _moe_layers(settings), settings["num_hidden_layers"]
    allowed = tuple(HIDDEN_ACT.values()) if len(sparse) == layers else ("silu",)
    if settings["hidden_act"] not in allowed:
        yield f"hidden_act ({settings['hidden_act']}) must be {' or '.join(allowed)}"
    if sparse and _pattern(sparse, layers) is None:
        yield f"its MoE layers ({', '.join(map(str, sparse))}) must be every n-th one after some dense ones"


def _rotary(settings: Settings) -> Mapping[str, Any]:
    return settings.get("rope_parameters") or {"rope_theta": settings.get("rope_theta", 10_000.0)}


def _moe_layers(settings: Settings) -> list[int]:
    """The layers that have experts."""
    layers, kind = range(settings["num_hidden_layers"]), settings["model_type"]
    if kind == "mixtral":
        return list(layers)
    if kind == "glm4_moe":
        return list(layers[settings["first_k_dense_replace"] :])
    if kind == "qwen3_moe":
        every, dense = settings["decoder_sparse_step"], settings["mlp_only_layers"] or ()
        return [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]
    return []


def _pattern(sparse: list[int], num_layers: int) -> Any:
    """(`dense_layers`, `moe_every`) that give these MoE layers; None if none do."""
    every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    candidates = [(sparse[0] + 1 - every, every), (0, sparse[0] + 1)]  # of a single one, the latter has none after it
    for first, step in candidates:
        if first >= 0 and [n for n in range(first, num_layers) if (n - first + 1) % step == 0] == sparse:
            return first, step
    return None


def _moe_section(settings: Settings) -> dict[str, Any]:
    kind = settings["model_type"]
    activation = next(ours for ours, theirs in HIDDEN_ACT.items() if theirs == settings["hidden_act"])
    moe: dict[str, Any] = {
        "num_experts": settings["n_routed_experts" if kind == "glm4_moe" else "num_local_experts"],
        "top_k": settings["num_experts_per_tok"],
        "expert_ffn_size": settings["intermediate_size" if kind == "mixtral" else "moe_intermediate_size"],
        "activation": activation,
        "router": {"normalize_weights": kind == "mixtral" or bool(settings["norm_topk_prob"])},
    }
    if kind != "glm4_moe":
        return moe
    if settings["n_shared_experts"]:
        moe["shared_expert_ffn_size"] = settings["n_shared_experts"] * settings["moe_intermediate_size"]
    moe["router"] |= {
        "score": "sigmoid",
        "scale": float(settings["routed_scaling_factor"]),
        "num_groups": settings["n_group"],
        "top_k_groups": settings["topk_group"],
    }
    return moe | {"balance": {"bias_update_rate": 0.001}}


def describe(config: Config) -> dict[str, Any]:
    """What a model computes from its weights, by our keys, the same for configs that say the same in another way."""
    model, dense = config.model, dense_layers(config)
    found: dict[str, Any] = {
        **{f"model.{key}": getattr(model, key) for key in ("vocab_size", "hidden_size", "num_layers", "num_heads")},
        "model.num_kv_heads": num_kv_heads(model),
        "model.head_dim": head_dim(model),
        **{f"model.{key}": getattr(model, key) for key in ("rope_theta", "norm_eps", "qk_norm", "tie_embeddings")},
        "dense layers": ", ".join(map(str, dense)) or "none",
    }
    if dense:
        found["model.ffn_size"] = model.ffn_size
    if config.moe is not None and len(dense) < model.num_layers:
        found |= _describe_moe(config.moe)
    return found


def _describe_moe(moe: Moe) -> dict[str, Any]:
    keys = ["num_experts", "top_k", "expert_ffn_size", "shared_expert_ffn_size", "residual", "activation"]
    router = [key for key in _ROUTER_KEYS if moe.router.num_groups > 1 or "group" not in key]
    return {
        **{f"moe.{key}": getattr(moe, key) for key in keys},
        "moe.router.choice": moe.router.choice,
        **{f"moe.router.{key}": getattr(moe.router, key) for key in router},
    }
