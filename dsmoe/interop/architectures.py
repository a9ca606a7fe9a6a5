"""The architectures of Hugging Face's that our options can be written as, and why others cannot.

What each computes was read in transformers 5.23's own files (`models/NAME/modeling_NAME.py`). All of them turn halves
of a head's vector (rotary positions) as we do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import show_value
from dsmoe.interop.names import Names
from dsmoe.plan.layers import head_dim, is_moe_layer, num_kv_heads

HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu"}
"""Our gated activations by the name that the function of the gate has there."""

MLA = (
    "its attention (MLA) makes keys and values out of one normed low-rank latent, and every head has a part that is "
    "not rotated: grouped-query attention cannot be written as that. Its routing can: export to glm4_moe, which has "
    "DeepSeek-V3's (sigmoid scores, selection bias, groups, factor, shared expert) beside grouped-query attention"
)


@dataclass(frozen=True)
class Need:
    """What an option must be for an architecture, and why."""

    key: str
    allowed: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class Architecture:
    """One of theirs.

    Attributes:
        name: its `model_type`.
        class_name: that of its causal language model.
        names: what it calls the parts of an MoE layer.
        needs: the values that our options must have.
        misfits: what else it cannot express, as sentences.
        settings: what its config says besides `common_settings`.
    """

    name: str
    class_name: str
    names: Names
    needs: tuple[Need, ...]
    misfits: Callable[[Config], Iterator[str]]
    settings: Callable[[Config], dict[str, Any]]

    def refusals(self, config: Config) -> list[str]:
        """Why the model of `config` is not one of these: each with key, value and what is needed."""
        unmet = []
        for need in self.needs:
            value = _value(config, need.key)
            if value not in need.allowed and not (config.moe is None and need.key.startswith("moe.")):
                allowed = " or ".join(map(show_value, need.allowed))
                unmet.append(f"{need.key} ({show_value(value)}) must be {allowed}: {need.reason}")
        return unmet + list(self.misfits(config))


def _value(config: Config, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def dense_layers(config: Config) -> list[int]:
    """The layers that are not MoE layers."""
    return [layer for layer in range(config.model.num_layers) if not is_moe_layer(config, layer)]


def common_settings(architecture: Architecture, config: Config) -> dict[str, Any]:
    """What the config of every architecture says; readers before and after transformers 5 find the rotary base."""
    model, activation = config.model, "swiglu"
    if config.moe is not None and len(dense_layers(config)) < model.num_layers:
        activation = config.moe.activation
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.name,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": num_kv_heads(model),
        "head_dim": head_dim(model),
        "hidden_act": HIDDEN_ACT[activation],
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_bias": False,
        **architecture.settings(config),
    }


_HAS_EXPERTS = (
    Need("moe.router.choice", ("token",), "its tokens choose their experts"),
    Need("moe.router.force_balanced", (False,), "it goes by the scores"),
    Need("moe.residual", (False,), "it has no residual MLP mixed in by learned coefficients"),
    Need("moe.activation", tuple(HIDDEN_ACT), "its experts are gated"),
)
_SOFTMAX = (
    Need("moe.router.score", ("softmax",), "its scores are a softmax over the experts"),
    Need("moe.router.scale", (1.0,), "it has no factor on its router weights"),
    Need("moe.router.num_groups", (1,), "its experts stand in no groups"),
    Need("moe.balance.bias_update_rate", (0.0,), "it has no selection bias"),
    Need("moe.shared_expert_ffn_size", (None,), "it has no shared expert that is simply added"),
)
_NO_QK_NORM = Need("model.qk_norm", (False,), "its attention norms neither queries nor keys")
_QK_NORM = Need("model.qk_norm", (True,), "its attention norms queries and keys")


def _with_experts(config: Config) -> Iterator[str]:
    if len(dense_layers(config)) == config.model.num_layers:
        yield "moe (null) must be there: it has experts"
    elif config.moe is not None and dense_layers(config) and config.moe.activation != "swiglu":
        yield (
            f"moe.activation ({config.moe.activation}) must be swiglu where there are dense layers "
            f"({_layers(config)}): those are SwiGLU, and it has one activation for both"
        )


def _only_experts(config: Config) -> Iterator[str]:
    yield from _with_experts(config)
    if 0 < len(dense_layers(config)) < config.model.num_layers:
        yield (
            f"model.dense_layers ({config.model.dense_layers}) and model.moe_every ({config.model.moe_every}) must be "
            f"0 and 1: all of its layers have experts"
        )


def _no_experts(config: Config) -> Iterator[str]:
    if len(dense_layers(config)) < config.model.num_layers:
        yield "moe must be null: it has no experts"


def _deepseek_style(config: Config) -> Iterator[str]:
    yield from _with_experts(config)
    moe, dense = config.moe, dense_layers(config)
    if moe is None:
        return
    if dense != list(range(len(dense))):
        yield (
            f"model.moe_every ({config.model.moe_every}) must be 1: dense layers ({_layers(config)}) are its first ones"
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


def _layers(config: Config) -> str:
    return ", ".join(map(str, dense_layers(config)))


def _mixtral(config: Config) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "intermediate_size": config.moe.expert_ffn_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": None,
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
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


def _glm4_moe(config: Config) -> dict[str, Any]:
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


def _dense(config: Config) -> dict[str, Any]:
    return {"intermediate_size": config.model.ffn_size}


_MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    Names("block_sparse_moe", ("w1", "w3", "w2")),
    (
        *_HAS_EXPERTS,
        *_SOFTMAX,
        Need("moe.router.normalize_weights", (True,), "the weights of a token's experts add up to 1"),
        _NO_QK_NORM,
    ),
    _only_experts,
    _mixtral,
)
_QWEN3_MOE = Architecture(
    "qwen3_moe", "Qwen3MoeForCausalLM", Names(), (*_HAS_EXPERTS, *_SOFTMAX, _QK_NORM), _with_experts, _qwen3_moe
)
_GLM4_MOE = Architecture(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    Names(shared="shared_experts", bias="gate.e_score_correction_bias"),
    (*_HAS_EXPERTS, Need("moe.router.score", ("sigmoid",), "its scores are sigmoids")),
    _deepseek_style,
    _glm4_moe,
)
_LLAMA = Architecture("llama", "LlamaForCausalLM", Names(), (_NO_QK_NORM,), _no_experts, _dense)
_MISTRAL = Architecture("mistral", "MistralForCausalLM", Names(), (_NO_QK_NORM,), _no_experts, _dense)
_QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", Names(), (_QK_NORM,), _no_experts, _dense)

ARCHITECTURES = {a.name: a for a in (_MIXTRAL, _QWEN3_MOE, _GLM4_MOE, _LLAMA, _QWEN3, _MISTRAL)}
"""In the order in which an export without a named one tries them."""


def choose(config: Config, name: str | None) -> Architecture:
    """The architecture of this name, or else the first that fits.

    Raises:
        UserError: it, or every one, cannot express the config's options; with all the reasons.
    """
    if name == "deepseek_v3":
        raise UserError(f"the model cannot be written as deepseek_v3: {MLA}")
    if name is not None and name not in ARCHITECTURES:
        raise UserError(f"there is no format {name!r}; give one of {', '.join(ARCHITECTURES)}")
    tried = {a.name: a.refusals(config) for a in ARCHITECTURES.values() if name in (None, a.name)}
    fitting = next((one for one, refusals in tried.items() if not refusals), None)
    if fitting is not None:
        return ARCHITECTURES[fitting]
    has_experts = len(dense_layers(config)) < config.model.num_layers
    shown = {one: r for one, r in tried.items() if name or (ARCHITECTURES[one].misfits is _no_experts) != has_experts}
    reasons = [f"  {one}: {refusal}" for one, refusals in shown.items() for refusal in refusals]
    raise UserError("\n".join([f"the model cannot be written as {' or '.join(shown)}:", *reasons]))
