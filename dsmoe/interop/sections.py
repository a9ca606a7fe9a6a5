"""From a Hugging Face config to the `model` and `moe` sections that describe the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dsmoe.config.checks import cross_field_problems
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Moe
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.architectures.parts import Settings
from dsmoe.plan.layers import dense_layers, head_dim, num_kv_heads

_ANY_RUN: dict[str, Any] = {
    "name": "any",
    "data": {"sources": ({"name": "any", "path": "any"},), "tokenizer": "any.json"},
    "optimizer": {"lr": 1.0},
    "train": {"steps": 1, "batch_tokens": 1, "sequence_length": 1},
}
_ROUTER_KEYS = ("score", "normalize_weights", "scale", "num_groups", "top_k_groups", "group_score")


def sections_of(settings: Settings) -> dict[str, Any]:
    """The `model` and `moe` sections, without what has our default.

    Raises:
        UserError: the model does something that ours cannot; with each key, value and what is needed.
    """
    architecture = architecture_of(settings)
    problems = architecture.settings_refusals(settings)
    if problems:
        raise UserError("\n  ".join(["the model does what ours cannot:", *problems]))
    sections = architecture.sections(settings)
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
