"""Which part of which of our tensors each tensor of a Hugging Face model is."""

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
    """What an architecture calls the parts of an MoE layer, below `model.layers.N.`; the dense parts are Llama's."""

    moe: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Match:
    """A tensor of theirs, and the box of ours that has the same elements."""

    theirs: str
    shape: tuple[int, ...]
    """Theirs."""
    key: str | None
    """Ours, as in a checkpoint's manifest; None where our model has none and theirs must be zero."""
    whole: tuple[int, ...]
    """The shape of all of ours."""
    box: Box


def matches(config: Config, names: Names) -> Iterator[Match]:
    """Every tensor of the model that `config` describes, in the order of the layers."""
    model = config.model
    table = (model.vocab_size, model.hidden_size)
    yield _same("model.embed_tokens.weight", "embedding.weight", *table)
    for layer in range(model.num_layers):
        yield from _attention(config, layer)
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        if is_moe_layer(config, layer):
            yield from _moe(config, names, f"{there}.{names.moe}", f"{here}.")
        else:
            assert model.ffn_size is not None, "checked when the config was loaded"
            yield from _feed_forward(f"{there}.mlp", f"{here}.ffn", model.hidden_size, model.ffn_size)
    yield _same("model.norm.weight", "norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        yield _same("lm_head.weight", "head.weight", *table)


def _attention(config: Config, layer: int) -> Iterator[Match]:
    model = config.model
    there, here = f"model.layers.{layer}", f"blocks.{layer}"
    width, size = model.hidden_size, head_dim(model)
    query, key_value = model.num_heads * size, num_kv_heads(model) * size
    yield _same(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight", width)
    for name, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield _same(f"{there}.self_attn.{name}.weight", f"{here}.attention.{name}.weight", rows, width)
    yield _same(f"{there}.self_attn.o_proj.weight", f"{here}.attention.o_proj.weight", width, query)
    for name in ("q_norm", "k_norm") if model.qk_norm else ():
        yield _same(f"{there}.self_attn.{name}.weight", f"{here}.attention.{name}.weight", size)
    yield _same(f"{there}.post_attention_layernorm.weight", f"{here}.ffn_norm.weight", width)


def _feed_forward(there: str, here: str, width: int, inner: int) -> Iterator[Match]:
    """A gated one: the gate's rows stand before the others in `gate_up`."""
    for part, name in enumerate(("gate_proj", "up_proj")):
        box = Box((part * inner, 0), (inner, width))
        yield _part(f"{there}.{name}.weight", box.shape, f"{here}.gate_up.weight", (2 * inner, width), box)
    yield _same(f"{there}.down_proj.weight", f"{here}.down.weight", width, inner)


def _moe(config: Config, names: Names, there: str, here: str) -> Iterator[Match]:
    assert config.moe is not None
    moe, width = config.moe, config.model.hidden_size
    experts, inner = moe.num_experts, moe.expert_ffn_size
    yield _same(f"{there}.gate.weight", f"{here}{ROUTER}", experts, width)
    if names.bias is not None:
        # Without the option, our model has no bias, and theirs has zeros.
        key = f"{BUFFER}/{here}{BIAS}" if moe.balance.bias_update_rate else None
        yield Match(f"{there}.{names.bias}", (experts,), key, (experts,), Box((0,), (experts,)))
    gate, up, down = names.expert
    for expert in range(experts):
        for part, name in enumerate((gate, up)):
            box = Box((expert, part * inner, 0), (1, inner, width))
            whole = (experts, 2 * inner, width)
            yield _part(
                f"{there}.experts.{expert}.{name}.weight", box.shape[1:], f"{here}{EXPERTS_GATE_UP}", whole, box
            )
        box = Box((expert, 0, 0), (1, width, inner))
        whole = (experts, width, inner)
        yield _part(f"{there}.experts.{expert}.{down}.weight", box.shape[1:], f"{here}{EXPERTS_DOWN}", whole, box)
    if moe.shared_expert_ffn_size is not None:
        assert names.shared is not None
        yield from _feed_forward(f"{there}.{names.shared}", f"{here}ffn.shared", width, moe.shared_expert_ffn_size)
    elif names.shared is not None:  # theirs is always there, without width if need be
        for name, shape in (("gate_proj", (0, width)), ("up_proj", (0, width)), ("down_proj", (width, 0))):
            yield Match(f"{there}.{names.shared}.{name}.weight", shape, None, shape, Box.all_of(shape))


def _same(there: str, here: str, *shape: int) -> Match:
    return _part(there, shape, here, shape, Box.all_of(shape))


def _part(there: str, shape: tuple[int, ...], here: str, whole: tuple[int, ...], box: Box) -> Match:
    return Match(there, shape, f"{MODEL}/{here}", whole, box)
