"""The decoder: embedding, blocks of attention and feed-forward, final norm, output head.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsmoe.config.schema import Config
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.model.init import initialise
from dsmoe.moe.layer import MoE
from dsmoe.moe.layout import Layout
from dsmoe.nn.attention import Attention, Rotary
from dsmoe.nn.feed_forward import FeedForward
from dsmoe.nn.linear import ColumnParallelLinear, VocabParallelEmbedding
from dsmoe.nn.loss import token_losses
from dsmoe.nn.norm import RMSNorm
from dsmoe.parallel.groups import ExpertGroup, Groups, TensorGroup
from dsmoe.parallel.mappings import (
    enter_sequence_parallel_region,
    enter_tensor_parallel_region,
    gather_from_tensor_parallel_region,
    leave_sequence_parallel_region,
)
from dsmoe.plan.layers import head_dim, is_moe_layer


class Transformer(nn.Module):
    """A causal language model, dense or Mixture-of-Experts.

    Args:
        config: `model`, `moe` and `train.recompute` are read.
        expert_group: the ranks that share the experts.
        group: the ranks that share the dense weights.
    """

    def __init__(self, config: Config, expert_group: ExpertGroup, group: TensorGroup) -> None:
        super().__init__()
        model = config.model
        self.recompute = config.train.recompute == "full"
        self.group = group
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden_size, group)
        self.rotary = Rotary(head_dim(model), model.rope_theta)
        self.blocks = nn.ModuleList(Block(config, index, expert_group, group) for index in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, model.norm_eps, group.over_sequence)
        self.head = ColumnParallelLinear(model.hidden_size, model.vocab_size, group)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token cross entropy of [B, S + 1] int64 tokens: [B, S] fp32, in nats."""
        hidden_BSD = enter_tensor_parallel_region(self.hidden_states(tokens[:, :-1]), self.group)
        targets_BS = tokens[:, 1:]
        losses_N = token_losses(hidden_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten(), self.group)
        return losses_N.view(targets_BS.shape)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] int64 tokens -> [B, S, V] scores of the next token."""
        logits_BSV = self.head(enter_tensor_parallel_region(self.hidden_states(tokens), self.group))
        return gather_from_tensor_parallel_region(logits_BSV, self.group)

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] int64 tokens -> [B, S, D], after the final norm; this rank's slice of S under sequence parallelism."""
        x_BSD = self.embedding(tokens)
        rotary = self.rotary(tokens.shape[1])
        for block in cast("Iterable[Block]", self.blocks):
            if self.recompute and self.training:
                x_BSD = checkpoint(block, x_BSD, rotary, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, rotary)
        return self.norm(x_BSD)

    def moe_layers(self) -> list[tuple[int, MoE]]:
        """The MoE layers with the index of their block."""
        return [(i, block.ffn) for i, block in enumerate(self.blocks) if isinstance(block.ffn, MoE)]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: Config, index: int, expert_group: ExpertGroup, group: TensorGroup) -> None:
        super().__init__()
        model = config.model
        self.group = group
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps, group.over_sequence)
        self.attention = Attention(model, group)
        self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, group.over_sequence)
        self.ffn: MoE | FeedForward
        if is_moe_layer(config, index):
            self.ffn = _moe_layer(config, expert_group, group)
        else:
            assert model.ffn_size is not None, "checked when the config is loaded"
            self.ffn = FeedForward(model.hidden_size, model.ffn_size, DENSE_ACTIVATION, group)

    def forward(self, x_BSD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            out_BSD, _, _ = self.ffn(enter_sequence_parallel_region(normed_BSD, self.group))
            return x_BSD + leave_sequence_parallel_region(out_BSD, self.group)
        return x_BSD + self.ffn(normed_BSD)


def build_model(config: Config, groups: Groups | None = None, device: torch.device | str = "cpu") -> Transformer:
    """Build the config's model on `device` in fp32, with weights that depend on `train.seed` and not on the layout.

    Args:
        config: the run.
        groups: this rank's groups; None builds the whole model for one process.
        device: of the weights.
    """
    expert_group, tensor_group = ExpertGroup.alone(), TensorGroup.alone()
    if groups is not None:
        expert_group, tensor_group = groups.expert_group(), groups.tensor_group(config.parallel.sequence)
    with torch.device(device):
        model = Transformer(config, expert_group, tensor_group)
    initialise(model, config)
    return model


def _moe_layer(config: Config, expert_group: ExpertGroup, tensor_group: TensorGroup) -> MoE:
    moe, num_slices = config.moe, config.parallel.expert_tensor
    assert moe is not None
    if expert_group.size == 1:  # the whole model in one process, whatever the config's layout
        num_slices = 1
    layout = Layout(
        expert_tensor=num_slices,
        tensor_group=tensor_group,
        max_tokens=config.train.micro_batch_size * config.train.sequence_length // tensor_group.size,
        overlap_chunks=config.parallel.overlap_chunks,
        recompute_experts=config.train.recompute == "selective",
    )
    layer = MoE(
        config.model.hidden_size,
        num_experts=moe.num_experts,
        ep_size=expert_group.size // num_slices,
        k=moe.top_k,
        router=moe.router,
        balance=moe.balance,
        capacity=moe.capacity,
        experts=moe.experts,
        layout=layout,
        seed=0,  # `initialise` draws the weights, by layer
    )
    layer.set_expert_group(expert_group)
    return layer
