"""Parameter counts of the model by part, from the config alone.

Legend: V vocabulary, D hidden, H query heads, KV key/value heads, hd head width, F dense inner width, E experts,
K experts per token, I expert inner width. Only the coefficients of a residual MoE have a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.config.registry import entry_named
from dsmoe.config.schema import Config
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.config.sections.moe import ACTIVATION_SHAPES
from dsmoe.plan.layers import head_dim, num_kv_heads, num_moe_layers
from dsmoe.plan.topology import Topology


@dataclass(frozen=True)
class DeviceParameters:
    """The parameters that one rank holds, by the group that shards their optimizer state under ZeRO."""

    shared: int
    """Everything but the experts: the same on all ranks of a data group."""
    experts: int
    """The rank's own experts: the same on all ranks of an expert_data group."""

    @property
    def total(self) -> int:
        """All parameters on the device."""
        return self.shared + self.experts


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters of the whole model, each counted once."""

    embedding: int
    """[V, D]."""
    output_head: int
    """[V, D], or 0 where it is the embedding."""
    attention: int
    """The query, key, value and output projections of all layers."""
    key_value: int
    """The key and value projections, a part of `attention`."""
    num_kv_heads: int
    """The key/value heads that those are for, in each layer."""
    dense_ffn: int
    """The SwiGLU blocks of the layers that are not MoE layers."""
    router: int
    """[E, D] per MoE layer."""
    experts: int
    """All experts of all MoE layers."""
    active_experts: int
    """The K experts per MoE layer that one token uses."""
    shared_experts: int
    """The shared expert, or the residual MLP, of each MoE layer: every token passes it."""
    residual_mix: int
    """[2, D] and [2] per MoE layer with a residual MLP: what it and the experts count."""
    norms: int
    """The RMSNorm weights, those over query and key heads included."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(total for total, _ in self.parts().values())

    @property
    def active(self) -> int:
        """Parameters that one token uses, the way model cards count: all but the experts it is not sent to."""
        return sum(active for _, active in self.parts().values())

    def parts(self) -> dict[str, tuple[int, int]]:
        """Return of each part how many parameters it has, and how many of them one token uses."""
        used_by_every_token = {
            "embedding": self.embedding,
            "output_head": self.output_head,
            "attention": self.attention,
            "dense_ffn": self.dense_ffn,
            "router": self.router,
            "shared_experts": self.shared_experts,
            "residual_mix": self.residual_mix,
            "norms": self.norms,
        }
        counts = {name: (count, count) for name, count in used_by_every_token.items()}
        return {**counts, "experts": (self.experts, self.active_experts)}

    def per_device(self, topology: Topology) -> DeviceParameters:
        """Count what one rank holds: matrices cut by tensor, experts by expert x expert_tensor, the rest whole.

        Where there are fewer key/value heads than tensor ranks, each of these holds their projections whole.
        """
        shared_key_value = self.key_value if self.num_kv_heads % topology.tensor else 0
        whole = self.router + self.residual_mix + self.norms + shared_key_value
        return DeviceParameters(
            shared=(self.total - self.experts - whole) // topology.tensor + whole,
            experts=self.experts // (topology.expert * topology.expert_tensor),
        )


def count_parameters(config: Config) -> ParameterCounts:
    """Count the parameters of the model that `config`, checked by `load_config`, describes."""
    model, moe = config.model, config.moe
    D, hd = model.hidden_size, head_dim(model)
    query_width, kv_width = model.num_heads * hd, num_kv_heads(model) * hd
    moe_layers = num_moe_layers(config)
    dense_layers = model.num_layers - moe_layers
    assert model.ffn_size or not dense_layers, "load_config refuses dense layers without a width"
    table = model.vocab_size * D
    matrices = entry_named(ACTIVATION_SHAPES, "moe.activation", moe.activation).matrices if moe else 0
    expert = matrices * D * moe.expert_ffn_size if moe else 0
    shared_expert = matrices * D * (moe.shared_expert_ffn_size or 0) if moe else 0
    is_residual = moe is not None and moe.residual
    layer_norms = 2 * D + (2 * hd if model.qk_norm else 0)
    return ParameterCounts(
        embedding=table,
        output_head=0 if model.tie_embeddings else table,
        attention=model.num_layers * 2 * D * (query_width + kv_width),  # query and output; key and value
        key_value=model.num_layers * 2 * D * kv_width,
        num_kv_heads=num_kv_heads(model),
        dense_ffn=dense_layers * ACTIVATION_SHAPES[DENSE_ACTIVATION].matrices * D * (model.ffn_size or 0),
        router=moe_layers * moe.num_experts * D if moe else 0,
        experts=moe_layers * moe.num_experts * expert if moe else 0,
        active_experts=moe_layers * moe.top_k * expert if moe else 0,
        shared_experts=moe_layers * (expert if is_residual else shared_expert),
        residual_mix=moe_layers * 2 * (D + 1) if is_residual else 0,
        norms=model.num_layers * layer_norms + D,
    )
