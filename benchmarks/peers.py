"""The same MoE layer by different libraries, with one router weight, so that every token makes the same choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import dsmoe


@dataclass(frozen=True)
class Shape:
    """Hidden size, inner width, experts, choices and tokens of a layer."""

    name: str
    hidden: int
    ffn: int
    experts: int
    top_k: int
    tokens: int

    @property
    def training_flops(self) -> int:
        """Forward and backward products of the chosen experts: 18 D I K per token."""
        return 18 * self.hidden * self.ffn * self.top_k * self.tokens


SHAPES = {
    "A": Shape("A", 512, 1024, 16, 2, 4096),
    "B": Shape("B", 1024, 512, 64, 8, 4096),
    "mixtral_8x7b": Shape("mixtral_8x7b", 4096, 14336, 8, 2, 8192),
    "qwen3_30b_a3b": Shape("qwen3_30b_a3b", 2048, 768, 128, 8, 32768),
}


class DenseFloor(nn.Module):
    """A SwiGLU feed-forward of equal active FLOPs: what no routing at all would cost."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn * shape.top_k, bias=False)
        self.down = nn.Linear(shape.ffn * shape.top_k, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Expert(nn.Module):
    """One SwiGLU expert, as a DeepSpeed user writes it."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class AutoEP(nn.Module):
    """DeepSpeed AutoEP's grouped experts behind a softmax top-k router."""

    def __init__(self, shape: Shape) -> None:
        from deepspeed.moe.ep_experts import GroupedExperts

        super().__init__()
        self.top_k = shape.top_k
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts = GroupedExperts(shape.hidden, shape.ffn, shape.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = F.linear(x.float(), self.gate.weight.float()).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.gate.weight.shape[0])
        rows = x[order // self.top_k]
        rows = (rows.float() * weights.flatten()[order][:, None]).to(x.dtype)
        out = self.experts(rows, counts)
        return torch.zeros_like(x).index_add(0, order // self.top_k, out)


def dsmoe_layer(shape: Shape, capacity: float | None) -> nn.Module:
    """Ours."""
    return dsmoe.MoE(
        shape.hidden,
        num_experts=shape.experts,
        k=shape.top_k,
        expert_ffn_size=shape.ffn,
        capacity_factor=capacity,
        seed=0,
    )


def deepspeed_layer(shape: Shape, capacity: float | None) -> nn.Module:
    """DeepSpeed's own."""
    from deepspeed.moe.layer import MoE

    options = {"drop_tokens": False} if capacity is None else {"capacity_factor": capacity}
    expert = Expert(shape.hidden, shape.ffn)
    return MoE(shape.hidden, expert, num_experts=shape.experts, k=shape.top_k, use_rts=False, **options)


def transformers_layer(shape: Shape, family: str, implementation: str) -> nn.Module:
    """Hugging Face's Mixtral or Qwen3-MoE block."""
    common = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k, "num_hidden_layers": 1}
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        config = MixtralConfig(num_local_experts=shape.experts, intermediate_size=shape.ffn, **common)
        config._experts_implementation = implementation
        return MixtralSparseMoeBlock(config)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    qwen = Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.ffn, norm_topk_prob=True, **common)
    qwen._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(qwen)


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "dense floor": DenseFloor,
    "dsmoe dropless": lambda shape: dsmoe_layer(shape, None),
    "dsmoe capacity 1.25": lambda shape: dsmoe_layer(shape, 1.25),
    "deepspeed no drop": lambda shape: deepspeed_layer(shape, None),
    "deepspeed capacity 1.25": lambda shape: deepspeed_layer(shape, 1.25),
    "deepspeed AutoEP grouped": AutoEP,
    "transformers mixtral eager": lambda shape: transformers_layer(shape, "mixtral", "eager"),
    "transformers mixtral grouped_mm": lambda shape: transformers_layer(shape, "mixtral", "grouped_mm"),
    "transformers qwen3 eager": lambda shape: transformers_layer(shape, "qwen3", "eager"),
    "transformers qwen3 grouped_mm": lambda shape: transformers_layer(shape, "qwen3", "grouped_mm"),
}


class Peer:
    """A peer's layer on tokens [T, D], with the given router weight and every other weight N(0, 0.02^2).

    Raises:
        ImportError: the peer is not installed.
    """

    def __init__(self, name: str, shape: Shape, router_ED: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.takes_batches = "transformers" in name
        self.layer = PEERS[name](shape).to(router_ED)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.shape == router_ED.shape:
                    parameter.copy_(router_ED)
                else:
                    parameter.normal_(0, 0.02)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        output = self.layer(x_TD[None] if self.takes_batches else x_TD)
        return (output[0] if isinstance(output, tuple) else output).view_as(x_TD)

    def train(self, x_TD: torch.Tensor, grad_TD: torch.Tensor) -> None:
        """Forward and backward."""
        self.forward(x_TD).backward(grad_TD)

    def clear(self, x_TD: torch.Tensor) -> None:
        """Forget the gradients, as `zero_grad` does: otherwise the next backward pass adds to them."""
        x_TD.grad = None
        self.layer.zero_grad(set_to_none=True)
