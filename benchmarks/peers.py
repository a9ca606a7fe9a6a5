"""The same MoE layer by different libraries, with one router weight, so that every token makes the same choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
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
    def forward_flops(self) -> int:
        """Products of the chosen experts: 6 D I K per token."""
        return 6 * self.hidden * self.ffn * self.top_k * self.tokens

    @property
    def training_flops(self) -> int:
        """The same with the two products of the backward pass for each: 18 D I K per token."""
        return 3 * self.forward_flops


# All peers of a shape are alive together. Of the largest, mixtral_8x7b, each has 8 x 3 x 4096 x 14336 = 1.4 G weights:
# ten of them are 28 GB in bf16. One at a time has gradients, 3 GB, and activations: of 32,768 tokens some 15 GB where
# capacity pads by a quarter. Together that is little more than half of an 80 GB card.
SHAPES = {
    "tiny": Shape("tiny", 32, 16, 4, 2, 64),  # for tests
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


def choose(x_TD: torch.Tensor, router_ED: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised softmax weights [T, K] in fp32, and the experts [T, K]."""
    weights_TK, experts_TK = F.linear(x_TD.float(), router_ED.float()).softmax(-1).topk(top_k, -1)
    return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK


class AutoEP(nn.Module):
    """DeepSpeed AutoEP's grouped experts behind a softmax top-k router."""

    def __init__(self, shape: Shape) -> None:
        from deepspeed.moe.ep_experts import GroupedExperts

        super().__init__()
        self.top_k = shape.top_k
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts = GroupedExperts(shape.hidden, shape.ffn, shape.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = choose(x, self.gate.weight, self.top_k)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.gate.weight.shape[0])
        rows = x[order // self.top_k]
        rows = (rows.float() * weights.flatten()[order][:, None]).to(x.dtype)
        out = self.experts(rows, counts)
        return torch.zeros_like(x).index_add(0, order // self.top_k, out)


class LigerGrouped(nn.Module):
    """Liger's fused Triton experts, as it patches them into transformers, behind the same router.

    Its autotuner (liger-kernel 0.8.5) measures 200 variants of seven kernels for every shape, which are minutes of
    compiling. Here it gets 26: those with the larger tiles.

    Raises:
        RuntimeError: there is no CUDA device to compile for.
    """

    def __init__(self, shape: Shape) -> None:
        if torch.get_default_device().type != "cuda":
            raise RuntimeError("Liger's Triton kernels need a CUDA device")
        from liger_kernel.ops import fused_moe
        from liger_kernel.transformers.swiglu import LigerExperts

        super().__init__()
        for kernel in vars(fused_moe).values():
            if hasattr(kernel, "configs"):
                kernel.configs = [config for config in kernel.configs if _is_tried(config)] or kernel.configs
        self.top_k = shape.top_k
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        sizes = {"hidden_size": shape.hidden, "num_experts": shape.experts, "moe_intermediate_size": shape.ffn}
        self.experts = LigerExperts(SimpleNamespace(hidden_act="silu", **sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = choose(x, self.gate.weight, self.top_k)
        return self.experts(x, chosen, weights.to(x.dtype))


def _is_tried(config: Any) -> bool:
    """Return whether Liger's autotuner measures this configuration of a product, or of the sum over choices."""
    tile = config.kwargs
    if "BLOCK_H" in tile:
        return (tile["BLOCK_H"], tile["BLOCK_K"]) == (128, 4)
    if "BLOCK_M" in tile:  # of a weight's gradient; these have 2 stages only
        return (tile["BLOCK_N"], tile["BLOCK_K"]) == (128, 32)
    return (tile["BLOCK_N"], tile["BLOCK_K"]) == (128, 64) and config.num_stages in (3, 4)


def dsmoe_layer(shape: Shape, capacity: float | None) -> nn.Module:
    """Ours."""
    return dsmoe.MoE(
        shape.hidden,
        num_experts=shape.experts,
        k=shape.top_k,
        capacity_factor=capacity,
        experts=dsmoe.Experts(expert_ffn_size=shape.ffn),
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
    "liger grouped": LigerGrouped,
}


class Peer:
    """A peer's layer on tokens [T, D], with the given router weight and every other weight N(0, 0.02^2).

    It is made on the router weight's device.

    Raises:
        ImportError: the peer is not installed.
    """

    def __init__(self, name: str, shape: Shape, router_ED: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.takes_batches = "transformers" in name
        with router_ED.device:
            layer = PEERS[name](shape)
        self.layer = layer.to(router_ED)
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


def check_memory(name: str, shape: Shape, x_TD: torch.Tensor, router_ED: torch.Tensor) -> None:
    """Raise MemoryError where a peer cannot have the memory, before it has taken most of it.

    DeepSpeed's dropless mode makes room in every expert for as many rows as the fullest has. Of each row there are at
    the end of the forward pass: the gathered token [D], its products [2 I], activation [I] and gated activation [I],
    which the backward pass needs; the output [D], and the same joined over the experts [D].
    """
    if name != "deepspeed no drop":
        return
    _, experts_TK = choose(x_TD.detach(), router_ED, shape.top_k)
    fullest = int(torch.bincount(experts_TK.flatten(), minlength=shape.experts).max())
    needed = shape.experts * fullest * (3 * shape.hidden + 4 * shape.ffn) * x_TD.element_size()
    if x_TD.is_cuda:
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"left out: {shape.experts} experts padded to the {fullest:,} rows of the fullest need "
            f"{needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        )
