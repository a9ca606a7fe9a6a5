"""DeepSpeed's engine for a model and a plan: groups, parameter groups, fp32 sums, clipping and the update guard."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dsmoe.config.deepspeed import REDUCE_BUCKET_ELEMENTS
from dsmoe.config.errors import UserError
from dsmoe.config.schedules import learning_rate
from dsmoe.engine.clipping import clip_before_each_step, take_norms_in_pieces
from dsmoe.engine.gradient_sums import fill_missing_gradients, sum_in_fp32
from dsmoe.engine.optimizer_state import fragments, inner_optimizer
from dsmoe.engine.parameter_groups import parameter_groups
from dsmoe.engine.update_guard import UpdateGuard
from dsmoe.moe.layer import MoE
from dsmoe.parallel.groups import Groups
from dsmoe.plan.plan import Plan
from dsmoe.runtime.local_device import device_index
from dsmoe.runtime.processes import set_group_timeouts
from dsmoe.runtime.rendezvous import Rendezvous


def make_engine(model: nn.Module, plan: Plan, groups: Groups, settings: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` for training by `plan`; collective.

    Args:
        model: any module; its `dsmoe.MoE` layers exchange tokens over `groups`. What no tensor rank has a part of
            alone becomes the first one's on all.
        plan: the run.
        groups: this rank's process groups.
        settings: the configuration for DeepSpeed, as `accepted_by_deepspeed` returns it.

    Returns:
        DeepSpeed's engine, with an `update_guard`; it steps its learning-rate scheduler itself.

    Raises:
        UserError: the config or the model are wrong.
    """
    options, steps = plan.config.optimizer, plan.batch.steps
    # Before DeepSpeed sees the model: making the engine, it asks every MoE layer for its groups.
    _prepare_layers(model, groups, plan.batch.accumulation_steps)
    _copy_first_tensor_rank(model, groups)
    routers = [module.router.weight for module in model.modules() if isinstance(module, MoE)]
    # Of after that copy: what is put back later is to be the same on all ranks.
    exact = [weight.detach().float().clone() for weight in routers]

    def make_optimizer(_: object) -> torch.optim.Optimizer:
        """Called by DeepSpeed when it has cast the model, and before it flattens the parameters."""
        restore_routers(routers, exact)
        # After that, since groups are by dtype, and routers are fp32 again.
        decayed = parameter_groups(model, options.weight_decay)
        return torch.optim.AdamW(decayed, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    engine, *_ = deepspeed.initialize(
        args=_device_of_its_own(),
        model=model,
        optimizer=make_optimizer,
        # LambdaLR multiplies the optimizer's rate, hence the division.
        lr_scheduler=lambda inner: LambdaLR(inner, lambda step: learning_rate(options, steps, step) / options.lr),
        config=settings,
        mpu=groups.mpu,
        # `Groups` has joined the processes.
        dist_init_required=False,
    )
    # Before the first backward pass, which would make gradients of the parameters' dtype.
    sum_in_fp32(engine)
    _reduce_over_own_groups(engine, groups)
    # Now that DeepSpeed has made its groups too, with a timeout of its own.
    set_group_timeouts(plan.collective_timeout)
    fragments(engine)  # refuses now what a checkpoint could not save
    engine.update_guard = UpdateGuard(engine)
    # ZeRO clips by the norm over all ranks itself; stage 0 has no such norm (see `clip_gradients`).
    if plan.config.parallel.zero_stage == 0:
        _forget_the_dry_step(engine)
        clip_before_each_step(engine, groups, options.grad_clip)
    else:
        take_norms_in_pieces(engine.optimizer)
    return engine


def _device_of_its_own() -> SimpleNamespace | None:
    """Return what tells DeepSpeed the device's number; it expects LOCAL_RANK (0.19.8, runtime/engine.py:1941).

    Return None where that is right. A rank to which its launcher shows one device drives number 0, whatever its
    LOCAL_RANK.
    """
    local_rank = Rendezvous.from_environment().local_rank or 0
    if get_accelerator().device_name() != "cuda" or device_index(local_rank) == local_rank:
        return None
    return SimpleNamespace(device_rank=device_index(local_rank))


def _prepare_layers(model: nn.Module, groups: Groups, accumulation_steps: int) -> None:
    """Set the MoE layers to exchange over `groups`, with balancing losses that count once per optimizer step.

    A layer of another expert degree than the config's is left to ask DeepSpeed for a group, when the engine is made.

    Raises:
        UserError: a layer was made for another number of tensor ranks.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            # The attached losses do not pass the engine's division of the loss by the number of micro-batches.
            module.loss_scale = 1.0 / accumulation_steps
            if (module.ep_size, module.layout.expert_tensor) == (groups.topology.expert, groups.topology.expert_tensor):
                module.set_expert_group(groups.expert_group(name))
            if module.layout.tensor_group.size != groups.topology.tensor:
                raise UserError(
                    f"the MoE layer {name} was made for {module.layout.tensor_group.size} tensor ranks, and "
                    f"parallel.tensor is {groups.topology.tensor}: make it with "
                    f"layout=dsmoe.Layout(tensor_group=groups.tensor_group())"
                )


def _reduce_over_own_groups(engine: deepspeed.DeepSpeedEngine, groups: Groups) -> None:
    """Register the engine's own groups before each reduction: DeepSpeed has one registry for all engines.

    Without ZeRO it does so at every reduction (0.19.8, runtime/engine.py:3883), and would find those of the engine that
    was made last.
    """
    # Bound now: the engine's own method, under the name that is replaced below.
    reduce = engine.allreduce_gradients

    def over_own_groups(bucket_size: int = REDUCE_BUCKET_ELEMENTS) -> None:
        groups.register_with_deepspeed()
        if not engine.zero_optimization():
            # Not earlier: only now is it known which parameters no micro-batch has used.
            fill_missing_gradients(engine.module)
        reduce(bucket_size)

    engine.allreduce_gradients = over_own_groups


def _copy_first_tensor_rank(model: nn.Module, groups: Groups) -> None:
    """Give every tensor rank the first one's value of each parameter that all of them have; collective.

    DeepSpeed does so among data ranks only, and ranks with other values would train other models without a word.
    """
    if groups.topology.tensor == 1:
        return
    first = groups.topology.group_of("tensor", groups.rank)[0]
    for parameter in model.parameters():
        # Experts are drawn by global id, and slices differ by design: neither is to become the first rank's.
        if not hasattr(parameter, "group_name") and not getattr(parameter, "tensor_model_parallel", False):
            dist.broadcast(parameter.data, src=first, group=groups.handle("tensor"))


def restore_routers(weights: list[nn.Parameter], exact: list[torch.Tensor]) -> None:
    """Give the routers' weights back the fp32 values that they had, rank 0's on every rank; collective.

    DeepSpeed's engine makes parameters equal on all ranks and casts every one of them to bf16 (0.19.8,
    runtime/engine.py:1862; `_keep_in_fp32_modules_strict` is for buffers only). Routers are to have the first without
    the second: bf16 has too few values to tell experts of near scores apart.
    """
    for weight, value in zip(weights, exact, strict=True):
        # A new tensor in the same parameter, so that the optimizer, which is made next, keeps an fp32 one.
        weight.data = value.to(weight.device)
        dist.broadcast(weight.data, src=0)


def _forget_the_dry_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the step on zero gradients by which DeepSpeed's stage-0 bf16 wrapper makes Adam's state.

    It counts as a step in Adam's bias correction, and decays the master weights.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "fp32_groups"):
        return
    # Moments and counts of a step on zero gradients are zeros and 1: the next step makes them anew.
    inner_optimizer(engine).state.clear()
    with torch.no_grad():
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                # Weight decay has moved the masters, and the weights have not been overwritten by them yet.
                master.copy_(weight)
