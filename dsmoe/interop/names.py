"""The box of one of dsmoe's tensors that each tensor of a Hugging Face model is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsmoe.checkpoint.state import BUFFER, MODEL
from dsmoe.config.schema import Config
from dsmoe.parallel.sharding import Box
from dsmoe.plan.layers import head_dim, is_moe_layer, num_kv_heads

ROUTER = "ffn.deepspeed_moe.gate.wg.weight"
EXPERTS_GATE_UP, EXPERTS_DOWN = "ffn.deepspeed_moe.experts.gate_up", "ffn.deepspeed_moe.experts.down"
BIAS = "ffn.balance.bias"


@dataclass(frozen=True)
class Names:
    """An architecture's names for the parts of an MoE layer, below `model.layers.N.`; the dense parts are Llama's."""

    moe: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Match:
    """A tensor of a Hugging Face model, and the box of one of dsmoe's tensors with the same elements."""

    hf_name: str
    hf_shape: tuple[int, ...]
    key: str | None
    """dsmoe's tensor, as in a checkpoint's manifest; None where its model has none, and Hugging Face's must be zero."""
    shape: tuple[int, ...]
    """Shape of dsmoe's tensor."""
    box: Box
    """Within dsmoe's tensor."""


def matches(config: Config, names: Names) -> Iterator[Match]:
    """Yield every tensor of the model that `config` describes, in the order of the layers."""
    model = config.model
    table = (model.vocab_size, model.hidden_size)
    yield _same("model.embed_tokens.weight", "embedding.weight", *table)
    for layer in range(model.num_layers):
        yield from _attention(config, layer)
        hf_path, path = f"model.layers.{layer}", f"blocks.{layer}"
        if is_moe_layer(config, layer):
            yield from _moe(config, names, f"{hf_path}.{names.moe}", f"{path}.")
        else:
            assert model.ffn_size is not None, "checked when the config was loaded"
            yield from _feed_forward(f"{hf_path}.mlp", f"{path}.ffn", model.hidden_size, model.ffn_size)
    yield _same("model.norm.weight", "norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        yield _same("lm_head.weight", "head.weight", *table)


def _attention(config: Config, layer: int) -> Iterator[Match]:
    model = config.model
    hf_path, path = f"model.layers.{layer}", f"blocks.{layer}"
    width, size = model.hidden_size, head_dim(model)
    query, key_value = model.num_heads * size, num_kv_heads(model) * size
    yield _same(f"{hf_path}.input_layernorm.weight", f"{path}.attention_norm.weight", width)
    for name, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield _same(f"{hf_path}.self_attn.{name}.weight", f"{path}.attention.{name}.weight", rows, width)
    yield _same(f"{hf_path}.self_attn.o_proj.weight", f"{path}.attention.o_proj.weight", width, query)
    for name in ("q_norm", "k_norm") if model.qk_norm else ():
        yield _same(f"{hf_path}.self_attn.{name}.weight", f"{path}.attention.{name}.weight", size)
    yield _same(f"{hf_path}.post_attention_layernorm.weight", f"{path}.ffn_norm.weight", width)


def _feed_forward(hf_path: str, path: str, width: int, inner: int) -> Iterator[Match]:
    """Yield the tensors of a gated feed-forward: in `gate_up`, the gate's rows stand before the others."""
    for part, name in enumerate(("gate_proj", "up_proj")):
        box = Box((part * inner, 0), (inner, width))
        yield _part(f"{hf_path}.{name}.weight", box.shape, f"{path}.gate_up.weight", (2 * inner, width), box)
    yield _same(f"{hf_path}.down_proj.weight", f"{path}.down.weight", width, inner)


def _moe(config: Config, names: Names, hf_path: str, path: str) -> Iterator[Match]:
    assert config.moe is not None
    moe, width = config.moe, config.model.hidden_size
    experts, inner = moe.num_experts, moe.expert_ffn_size
    yield _same(f"{hf_path}.gate.weight", f"{path}{ROUTER}", experts, width)
    if names.bias is not None:
        # Without the option, dsmoe's model has no bias, and Hugging Face's has zeros.
        key = f"{BUFFER}/{path}{BIAS}" if moe.balance.bias_update_rate else None
        yield Match(f"{hf_path}.{names.bias}", (experts,), key, (experts,), Box((0,), (experts,)))
    gate, up, down = names.expert
    for expert in range(experts):
        for part, name in enumerate((gate, up)):
            box = Box((expert, part * inner, 0), (1, inner, width))
            stack = (experts, 2 * inner, width)
            yield _part(
                f"{hf_path}.experts.{expert}.{name}.weight", box.shape[1:], f"{path}{EXPERTS_GATE_UP}", stack, box
            )
        box = Box((expert, 0, 0), (1, width, inner))
        stack = (experts, width, inner)
        yield _part(f"{hf_path}.experts.{expert}.{down}.weight", box.shape[1:], f"{path}{EXPERTS_DOWN}", stack, box)
    if moe.shared_expert_ffn_size is not None:
        assert names.shared is not None
        yield from _feed_forward(f"{hf_path}.{names.shared}", f"{path}ffn.shared", width, moe.shared_expert_ffn_size)
    elif names.shared is not None:  # in Hugging Face's model it is always there, of width 0 if need be
        for name, shape in (("gate_proj", (0, width)), ("up_proj", (0, width)), ("down_proj", (width, 0))):
            yield Match(f"{hf_path}.{names.shared}.{name}.weight", shape, None, shape, Box.whole(shape))


def _same(hf_name: str, name: str, *shape: int) -> Match:
    return _part(hf_name, shape, name, shape, Box.whole(shape))


def _part(hf_name: str, hf_shape: tuple[int, ...], name: str, shape: tuple[int, ...], box: Box) -> Match:
    return Match(hf_name, hf_shape, f"{MODEL}/{name}", shape, box)
