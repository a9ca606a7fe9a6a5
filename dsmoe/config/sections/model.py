"""The section `model`: the transformer around the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from dsmoe.config.errors import Problem
from dsmoe.config.sections.base import (
    Layers,
    Length,
    MathEffect,
    PositiveFloat,
    Section,
    TensorEffect,
    Width,
    whole_number,
)
from dsmoe.config.suggestions import divisors_of, nearest_multiples_of, nearest_of

if TYPE_CHECKING:
    from dsmoe.config.sections.moe import Moe


DENSE_ACTIVATION = "swiglu"
"""Activation of the dense blocks; `moe.activation` is that of the experts."""


class Model(Section):
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: TensorEffect[Length]
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    hidden_size: TensorEffect[Width]
    """Width of the residual stream."""
    num_layers: TensorEffect[Layers]
    """Transformer blocks, dense and MoE together."""
    num_heads: TensorEffect[Width]
    """Query heads."""
    num_kv_heads: TensorEffect[Width | None] = None
    """Key/value heads; null means as many as `num_heads`."""
    head_dim: TensorEffect[Width | None] = None
    """Width of one head; null means hidden_size / num_heads."""
    ffn_size: TensorEffect[Width | None] = None
    """Inner width of the dense SwiGLU blocks; needed only when some layer is dense."""
    dense_layers: TensorEffect[Annotated[int, Field(ge=0, le=10_000), BeforeValidator(whole_number)]] = 0
    """The first n layers stay dense."""
    moe_every: TensorEffect[Layers] = 1
    """After the dense layers, every n-th layer is an MoE layer (the last of each n)."""
    max_sequence_length: MathEffect[Length]
    """The longest sequence the model is made for, in tokens."""
    rope_theta: TensorEffect[PositiveFloat] = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: TensorEffect[PositiveFloat] = 1e-5
    """Added to the mean square in every RMSNorm."""
    qk_norm: TensorEffect[bool] = False
    """RMSNorm over each query and key head (Qwen3)."""
    tie_embeddings: TensorEffect[bool] = False
    """The output layer uses the embedding's weights."""
    init_std: MathEffect[PositiveFloat] = 0.02
    """Standard deviation of the initial weights."""


def attention_problems(model: Model) -> Iterator[Problem]:
    """Check that heads divide the width, key/value heads divide query heads, and heads have an even width."""
    num_kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) must divide model.num_heads ({model.num_heads}); "
            f"nearest: {nearest_of(num_kv_heads, divisors_of(model.num_heads))}",
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            "model.num_heads",
            f"model.num_heads ({model.num_heads}) must divide model.hidden_size ({model.hidden_size}); "
            f"nearest: {nearest_of(model.num_heads, divisors_of(model.hidden_size))}, or set model.head_dim",
        )
    elif model.head_dim is None and model.hidden_size // model.num_heads % 2:
        width = f"{model.hidden_size} / {model.num_heads} = {model.hidden_size // model.num_heads}"
        yield (
            "model.num_heads",
            f"model.hidden_size / model.num_heads ({width}) must be even, because rotary positions turn pairs; "
            "change one of them or set model.head_dim",
        )
    elif model.head_dim is not None and model.head_dim % 2:
        yield (
            "model.head_dim",
            f"model.head_dim ({model.head_dim}) must be even, because rotary positions turn pairs; "
            f"nearest: {nearest_multiples_of(model.head_dim, 2)}",
        )


def layer_problems(model: Model, moe: Moe | None) -> Iterator[Problem]:
    """Check that the model has MoE layers if `moe` is set, and dense layers exactly if `ffn_size` is set."""
    num_moe_layers = 0
    if moe is not None:
        # Layer i is an MoE layer if i >= dense_layers and (i - dense_layers + 1) % moe_every == 0.
        num_moe_layers = max(0, model.num_layers - model.dense_layers) // model.moe_every
        if num_moe_layers == 0:
            yield (
                "model",
                f"model.num_layers ({model.num_layers}), model.dense_layers ({model.dense_layers}) and model.moe_every "
                f"({model.moe_every}) leave no MoE layer; dense_layers + moe_every must be at most num_layers, "
                "or set moe: null",
            )
    num_dense_layers = model.num_layers - num_moe_layers
    if num_dense_layers and model.ffn_size is None:
        yield (
            "model",
            f"model.ffn_size is missing: {num_dense_layers} of {model.num_layers} layers are dense; "
            "set it to their inner width",
        )
    if not num_dense_layers and model.ffn_size is not None:
        yield (
            "model.ffn_size",
            f"model.ffn_size ({model.ffn_size}) would be unused: all {model.num_layers} layers are MoE layers, whose "
            "width is moe.expert_ffn_size; remove it",
        )
