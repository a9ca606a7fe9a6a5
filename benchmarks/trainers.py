"""The same language model trained by different libraries: each a whole model in a DeepSpeed engine, and its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from benchmarks.peers import Expert
from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.schema import Config
from dsmoe.engine.parameter_groups import parameter_groups
from dsmoe.model import build_model
from dsmoe.parallel import Groups
from dsmoe.plan import Plan
from dsmoe.runtime.processes import Rank
from dsmoe.train.initialize import prepare_data
from dsmoe.train.trainer import make_trainer


@dataclass
class Contender:
    """One library's model and engine on this rank.

    Attributes:
        engine: DeepSpeed's.
        micro_batch: which part of the global batch is this rank's: (number, of how many).
        step: forward, backward, gradient reduction and optimizer step on that part, [B, S + 1] int64.
        loss: the cross entropy of such a part, of this rank's weights.
        kept_bytes: device memory that it keeps between steps; CUDA only, as the next.
        peak_bytes: the most that it has had during a step.
    """

    engine: deepspeed.DeepSpeedEngine
    micro_batch: tuple[int, int]
    step: Callable[[torch.Tensor], object]
    loss: Callable[[torch.Tensor], torch.Tensor]
    kept_bytes: int = 0
    peak_bytes: int = 0

    def part_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the global batch."""
        number, count = self.micro_batch
        return tokens.chunk(count)[number]

    def activate(self) -> None:
        """Show DeepSpeed this contender's tensor group, or that it has none.

        It keeps that of the engine made last in a global variable, where its MoE layer and ZeRO look in every step.
        """
        deepspeed_groups.mpu = self.engine.mpu

    @contextmanager
    def memory_counted(self) -> Iterator[None]:
        """A step is done in here. What other contenders keep is there before and after, and so left out."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes + torch.cuda.max_memory_allocated() - before)
        self.kept_bytes += torch.cuda.memory_allocated() - before


def dsmoe_contender(config: Config, rank: Rank, folder: Path) -> Contender:
    """`dsmoe.train.Trainer`, as `launch/pretrain.py` runs it, fed with the given tokens."""
    plan = Plan.from_config(config)
    groups = Groups(plan.topology)
    trainer = make_trainer(plan, groups, rank, folder, prepare_data(config))

    def step(tokens: torch.Tensor) -> None:
        trainer.data = replace(trainer.data, loader=_OneMicroBatch(tokens))
        trainer.step()

    data = (groups.coordinate("data"), plan.topology.data)
    return Contender(trainer.engine, data, step, lambda tokens: trainer.model(tokens.to(rank.device)).mean())


def deepspeed_contender(config: Config, rank: Rank) -> Contender:
    """The same model, from the same weights, with DeepSpeed's own MoE layers, in `deepspeed.initialize`'s engine."""
    model = build_model(config, device=rank.device)
    layers = []
    for block in model.blocks:
        with rank.device:
            block.ffn = _deepspeed_layer(block.ffn, config)
        layers.append(block.ffn)
    assert config.moe is not None
    coefficient = config.moe.balance.aux_loss

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens).mean()

    def training_loss(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor) -> torch.Tensor:
        return engine(tokens).mean() + coefficient * sum(layer.balance_loss for layer in layers)

    return _in_engine(model, config, rank, training_loss, loss)


def transformers_contender(config: Config, rank: Rank) -> Contender:
    """The same model as transformers' `Qwen3MoeForCausalLM`, from the same weights, in `deepspeed.initialize`'s engine.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model, moe = config.model, config.moe
    assert moe is not None
    shape = Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.expert_ffn_size,
        norm_topk_prob=True,
        output_router_logits=True,  # without it there is no balancing loss
        router_aux_loss_coef=moe.balance.aux_loss,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    with rank.device:  # where weights are drawn: a CPU takes minutes for a card's worth of them
        network = Qwen3MoeForCausalLM(shape)
    weights = dict(build_model(config, device=rank.device).named_parameters())
    network.load_state_dict({_transformers_name(name): weight for name, weight in weights.items()})

    # `shift_labels`: inputs and targets are cut beforehand, as ours are; otherwise the last token would be left out.
    def arguments(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        targets = tokens[:, 1:].contiguous()
        return {"input_ids": tokens[:, :-1], "labels": targets, "shift_labels": targets}

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        output = network(**arguments(tokens))
        return output.loss - moe.balance.aux_loss * output.aux_loss

    def training_loss(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor) -> torch.Tensor:
        return engine(**arguments(tokens)).loss

    return _in_engine(network, config, rank, training_loss, loss)


def _transformers_name(name: str) -> str:
    """Return the name in `Qwen3MoeForCausalLM` of a parameter of `dsmoe.model.Transformer`."""
    for ours, theirs in (
        ("ffn.deepspeed_moe.gate.wg.", "mlp.gate."),
        ("ffn.deepspeed_moe.experts.gate_up", "mlp.experts.gate_up_proj"),
        ("ffn.deepspeed_moe.experts.down", "mlp.experts.down_proj"),
        ("attention_norm.", "input_layernorm."),
        ("ffn_norm.", "post_attention_layernorm."),
        ("attention.", "self_attn."),
        ("blocks.", "layers."),
        ("embedding.", "embed_tokens."),
    ):
        name = name.replace(ours, theirs)
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def _in_engine(
    model: nn.Module,
    config: Config,
    rank: Rank,
    training_loss: Callable[[deepspeed.DeepSpeedEngine, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> Contender:
    """A data-parallel engine with dsmoe's DeepSpeed configuration, optimizer and parameter groups."""
    options = config.optimizer
    deepspeed_groups.mpu = None  # that of an engine made before

    def make_optimizer(_: object) -> torch.optim.Optimizer:
        groups = parameter_groups(model, options.weight_decay)
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer, config=to_deepspeed(config, 1), dist_init_required=False
    )

    def step(tokens: torch.Tensor) -> None:
        engine.backward(training_loss(engine, tokens.to(rank.device)))
        engine.step()

    return Contender(engine, (rank.rank, rank.world_size), step, lambda tokens: loss(tokens.to(rank.device)))


@dataclass(frozen=True)
class _OneMicroBatch:
    """The part of a loader that a `Trainer` needs."""

    tokens: torch.Tensor

    def micro_batches(self, _: int) -> Iterator[torch.Tensor]:
        yield self.tokens


class _DeepSpeedFeedForward(nn.Module):
    """DeepSpeed's MoE layer where a block expects a feed-forward; keeps the balancing loss of its last pass."""

    balance_loss: torch.Tensor

    def __init__(self, layer: DeepSpeedMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        out_BSD, self.balance_loss, _ = self.layer(x_BSD)
        return out_BSD


def _deepspeed_layer(ours: Any, config: Config) -> _DeepSpeedFeedForward:
    """DeepSpeed's layer with the weights of `ours`, a whole `dsmoe.MoE`; this rank's part of its experts."""
    moe, model = config.moe, config.model
    assert moe is not None
    factor = moe.capacity.factor
    layer = DeepSpeedMoE(
        model.hidden_size,
        Expert(model.hidden_size, moe.expert_ffn_size),
        num_experts=moe.num_experts,
        ep_size=config.parallel.expert,
        k=moe.top_k,
        capacity_factor=factor or 1.0,
        min_capacity=moe.capacity.minimum,
        drop_tokens=factor is not None,
        top2_2nd_expert_sampling=False,  # the second best expert, as everywhere else
    )
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    first = torch.distributed.get_rank() % config.parallel.expert * len(experts)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
        for index, expert in enumerate(experts, start=first):
            expert.gate_up.weight.copy_(ours.experts.gate_up[index])
            expert.down.weight.copy_(ours.experts.down[index])
    return _DeepSpeedFeedForward(layer)
