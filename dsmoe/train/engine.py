"""`dsmoe.initialize`: `deepspeed.initialize` with parameter groups, clipping and loss scale that suit experts."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource, TrainLoader, prepare
from dsmoe.moe.layer import MoE
from dsmoe.parallel.distributed import on_first_rank, set_timeout_everywhere
from dsmoe.parallel.groups import Groups
from dsmoe.plan.batch import Batch
from dsmoe.train.schedule import learning_rate


def initialize(
    *, model: nn.Module, config: Config, groups: Groups
) -> tuple[deepspeed.DeepSpeedEngine, torch.optim.Optimizer, TrainLoader, LambdaLR]:
    """Wrap `model` for training by `config`.

    Collective: every rank calls it. The data are tokenised by the first rank where no cache of them exists yet.

    Args:
        model: any module; its `dsmoe.MoE` layers exchange tokens over `groups`.
        config: the run.
        groups: this rank's process groups.

    Returns:
        DeepSpeed's engine; its optimizer; the training data; the learning-rate scheduler, which the engine steps.
    """
    loader = TrainLoader(prepare_once(config), config, groups.coordinate("data"), groups.topology.data)
    batch = Batch.from_config(config)
    for module in model.modules():
        if isinstance(module, MoE):
            module.loss_scale = 1.0 / batch.accumulation_steps
            if module.ep_size == groups.topology.expert:
                module.set_expert_group(groups.expert_group())
    options = config.optimizer
    adam = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model,
        optimizer=adam,
        lr_scheduler=lambda inner: LambdaLR(inner, lambda step: learning_rate(options, batch.steps, step) / options.lr),
        config=to_deepspeed(config, batch.accumulation_steps),
        dist_init_required=False,
    )
    set_timeout_everywhere(timedelta(seconds=config.cluster.collective_timeout_seconds))
    return engine, optimizer, loader, scheduler


def prepare_once(config: Config) -> list[PreparedSource]:
    """The prepared data of `config`, tokenised by one rank while the others wait; collective.

    Where nodes do not share `data.cache_dir`, the first rank of each node makes its own.
    """
    on_first_rank(lambda: len(prepare(config)))
    if os.environ["LOCAL_RANK"] == "0":
        prepare(config)
    dist.barrier()
    return prepare(config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: dense and expert parameters, each with and without weight decay.

    Vectors (norms, biases) are not decayed. Expert groups carry `moe` and the name of their process group, by which
    ZeRO finds it; since they do, DeepSpeed neither merges nor cuts them (it would lose the decay, and leave an empty
    group before a stacked parameter of more than 178,956,971 elements).
    """
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            expert_group = getattr(parameter, "group_name", None)
            groups.setdefault((expert_group, parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "moe": expert_group is not None,
            "name": expert_group or ("matrices" if decayed else "vectors"),
        }
        for (expert_group, decayed), parameters in groups.items()
    ]


def clip_gradients(model: nn.Module, groups: Groups, max_norm: float) -> torch.Tensor:
    """Scale the reduced gradients so that their global norm is at most `max_norm`; for ZeRO stage 0.

    DeepSpeed's own stage-0 clip averages each rank's norm instead of adding up the experts', so that the same model
    is clipped differently at every expert degree.

    Returns:
        The norm before clipping, a scalar on the device; 0-d float32. Nothing is read back to the host.
    """
    dense = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "group_name")]
    expert = [p.grad for p in model.parameters() if p.grad is not None and hasattr(p, "group_name")]
    square = _square_norm(expert, dense[0].device)
    if groups.topology.expert > 1:
        dist.all_reduce(square, group=groups.handle("expert"))
    norm = (square + _square_norm(dense, dense[0].device)).sqrt()
    if max_norm > 0 and math.isfinite(max_norm):
        torch._foreach_mul_(dense + expert, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm.float()


def _square_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of squares of all elements, float64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm([g.float() for g in gradients])]).square().sum()
