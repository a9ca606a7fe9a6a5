"""`dsmoe.initialize`: `deepspeed.initialize` with parameter groups, clipping and loss scale that suit experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import chain
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups as deepspeed_groups
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dsmoe.checkpoint.fragments import fragments, inner_optimizer
from dsmoe.config.deepspeed import REDUCE_BUCKET_ELEMENTS, to_deepspeed
from dsmoe.config.errors import UserError
from dsmoe.config.schedules import learning_rate
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource, TrainLoader, prepare
from dsmoe.data.cache import VERIFIED_AT_START
from dsmoe.launch.rendezvous import Rendezvous
from dsmoe.moe.layer import MoE
from dsmoe.parallel.claims import check_alike
from dsmoe.parallel.devices import device_index
from dsmoe.parallel.distributed import on_first_of_hosts, on_first_rank, set_timeout_everywhere
from dsmoe.parallel.groups import Groups
from dsmoe.plan.batch import Batch
from dsmoe.train.alike import claims_of_data, claims_of_run
from dsmoe.train.gradient_sums import fill_missing_gradients, sum_in_fp32
from dsmoe.train.guard import UpdateGuard

ELEMENTS_PER_PIECE = 2**18
"""Of a gradient on a CPU, when its norm is taken."""


def initialize(
    *, model: nn.Module, config: Config, groups: Groups, sources: Sequence[PreparedSource] | None = None
) -> tuple[deepspeed.DeepSpeedEngine, torch.optim.Optimizer, TrainLoader, LambdaLR]:
    """Wrap `model` for training by `config`.

    Collective: every rank calls it, with the same config but for paths, the same code and the same data, which are
    compared.

    Args:
        model: any module; its `dsmoe.MoE` layers exchange tokens over `groups`.
        config: the run.
        groups: this rank's process groups. What no tensor rank has a part of alone becomes the first one's on all.
        sources: the data, as `prepare_data` returns them; None prepares them.

    Returns:
        DeepSpeed's engine, with an `update_guard` (`dsmoe.train.guard`); its optimizer; the training data; the
        learning-rate scheduler, which the engine steps.

    Raises:
        UserError: the config, the data or the model are wrong.
        DifferentRanksError: ranks have other settings, code or data than rank 0.
    """
    check_alike(claims_of_run(config))  # first: a rank with another tokenizer would make a cache of its own
    batch = Batch.from_config(config)
    for_deepspeed = accepted_by_deepspeed(config, batch.accumulation_steps)  # before data that take hours are prepared
    sources = prepare_data(config) if sources is None else sources
    loader = TrainLoader(sources, config, groups.coordinate("data"), groups.topology.data)
    _prepare_layers(model, groups, batch.accumulation_steps)
    _copy_first_tensor_rank(model, groups)
    options = config.optimizer
    routers = [module.router.weight for module in model.modules() if isinstance(module, MoE)]
    exact = [weight.detach().float().clone() for weight in routers]

    def make_optimizer(_: object) -> torch.optim.Optimizer:
        """Called by DeepSpeed when it has cast the model, and before it flattens the parameters."""
        restore_routers(routers, exact)
        decayed = parameter_groups(model, options.weight_decay)
        return torch.optim.AdamW(decayed, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    engine, optimizer, _, scheduler = deepspeed.initialize(
        args=_device_of_its_own(),
        model=model,
        optimizer=make_optimizer,
        lr_scheduler=lambda inner: LambdaLR(inner, lambda step: learning_rate(options, batch.steps, step) / options.lr),
        config=for_deepspeed,
        mpu=groups.mpu,
        dist_init_required=False,
    )
    sum_in_fp32(engine)
    _reduce_over_own_groups(engine, groups)
    set_timeout_everywhere(timedelta(seconds=config.cluster.collective_timeout_seconds))
    fragments(engine)  # refuses now what a checkpoint could not save
    engine.update_guard = UpdateGuard(engine)
    if config.parallel.zero_stage == 0:
        _forget_the_dry_step(engine)
        _clip_before_each_step(engine, groups, options.grad_clip)
    else:
        _take_norms_in_pieces(engine.optimizer)
    return engine, optimizer, loader, scheduler


def accepted_by_deepspeed(config: Config, accumulation_steps: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, which DeepSpeed's own parser has taken.

    Raises:
        UserError: DeepSpeed refuses something in the `deepspeed` section; with the first key that it refuses by itself.
    """

    def refusal(section: dict[str, Any]) -> Exception | None:
        """What DeepSpeed's parser raises, if anything: it has no class of its own for a user's mistakes."""
        try:
            DeepSpeedConfig(to_deepspeed(config.model_copy(update={"deepspeed": section}), accumulation_steps))
        except Exception as error:
            return error
        return None

    reason = refusal(config.deepspeed)
    if reason is None:
        return to_deepspeed(config, accumulation_steps)
    if (ours := refusal({})) is not None:
        raise ours
    alone = ((f".{key}", refusal(section)) for key, section in _one_by_one(config.deepspeed))
    key, reason = next(((key, found) for key, found in alone if found is not None), ("", reason))
    raise UserError(f"deepspeed{key}: DeepSpeed refuses it: {' '.join(str(reason).split())}; change or remove it")


def _one_by_one(section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key of a section that has no keys below it, dotted, and the section with that alone."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{below}", {name: alone}) for below, alone in _one_by_one(value))
        else:
            yield name, {name: value}


def _device_of_its_own() -> SimpleNamespace | None:
    """What tells DeepSpeed the number of the device, which it takes to be LOCAL_RANK (0.19.8, runtime/engine.py:1941).

    None where it is. A rank to which its launcher shows one device drives number 0, whatever its own number is.
    """
    local_rank = Rendezvous.from_environment().local_rank or 0
    if get_accelerator().device_name() != "cuda" or device_index(local_rank) == local_rank:
        return None
    return SimpleNamespace(device_rank=device_index(local_rank))


def prepare_data(config: Config) -> list[PreparedSource]:
    """Prepare the data of `config`, tokenised by one rank while the others wait; collective.

    Where nodes do not share `data.cache_dir`, the first rank of each node makes its own, in its own time: nobody waits
    with a limit. That rank also looks whether the files are what was written (`prepare`'s `check`); the others check
    what they read.

    Raises:
        UserError: the data are wrong.
        DifferentRanksError: ranks have other data than rank 0.
    """
    on_first_rank(lambda: len(prepare(config, VERIFIED_AT_START)), "preparing the data")
    on_first_of_hosts(lambda: len(prepare(config, VERIFIED_AT_START)), "preparing the data of each host")
    sources = prepare(config, check=0)
    check_alike(claims_of_data(sources))
    return sources


def _prepare_layers(model: nn.Module, groups: Groups, accumulation_steps: int) -> None:
    """Let every MoE layer exchange over `groups`, with balancing losses that count once per optimizer step.

    A layer of another expert degree than the config's is left to ask DeepSpeed for a group, when the engine is made.

    Raises:
        UserError: a layer was made for another number of tensor ranks.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoE):
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
    """Let the engine reduce over its own groups although DeepSpeed looks them up in one registry for all engines.

    Without ZeRO it does so at every reduction (0.19.8, runtime/engine.py:3883), and would find those of the engine that
    was made last.
    """
    reduce = engine.allreduce_gradients

    def over_own_groups(bucket_size: int = REDUCE_BUCKET_ELEMENTS) -> None:
        groups.register_with_deepspeed()
        if not engine.zero_optimization():
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
        if not hasattr(parameter, "group_name") and not getattr(parameter, "tensor_model_parallel", False):
            dist.broadcast(parameter.data, src=first, group=groups.handle("tensor"))


def restore_routers(weights: list[nn.Parameter], exact: list[torch.Tensor]) -> None:
    """Give the routers' weights back the fp32 values that they had, rank 0's on every rank; collective.

    DeepSpeed's engine makes parameters equal on all ranks and casts every one of them to bf16 (0.19.8,
    runtime/engine.py:1862; `_keep_in_fp32_modules_strict` is for buffers only). Routers are to have the first without
    the second: bf16 has too few values to tell experts of near scores apart.
    """
    for weight, value in zip(weights, exact, strict=True):
        weight.data = value.to(weight.device)
        dist.broadcast(weight.data, src=0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: dense and expert parameters, each with and without weight decay, of one dtype each.

    Vectors (norms, biases) are not decayed. Expert groups carry `moe` and the name of their process group, by which
    ZeRO finds it; since they do, DeepSpeed neither merges nor cuts them (it would lose the decay, and leave an empty
    group before a stacked parameter of more than 178,956,971 elements). ZeRO flattens a group into one buffer and
    takes the first parameter's dtype for the model's, so the fp32 routers of a bf16 model are a group, and the last.
    What is cut over the tensor group is apart as well (`split`), for `clip_gradients`: the fp32 copies that DeepSpeed
    puts into the groups at stage 0 do not say so themselves.
    """
    groups: dict[tuple[str | None, bool, bool, torch.dtype], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            expert_group = getattr(parameter, "group_name", None)
            split = getattr(parameter, "tensor_model_parallel", False)
            groups.setdefault((expert_group, split, parameter.dim() >= 2, parameter.dtype), []).append(parameter)
    in_order = sorted(groups.items(), key=lambda item: item[0][3].itemsize)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "moe": expert_group is not None,
            "split": split,
            "name": expert_group or ("matrices" if decayed else "vectors"),
        }
        for (expert_group, split, decayed, _), parameters in in_order
    ]


def clip_gradients(optimizer: torch.optim.Optimizer, groups: Groups, max_norm: float) -> torch.Tensor:
    """Scale the reduced gradients so that their global norm is at most `max_norm`; for ZeRO stage 0.

    DeepSpeed's own stage-0 clip averages each rank's norm instead of adding up the experts', so that the same model
    is clipped differently at every expert degree.

    Args:
        optimizer: its groups are those of `parameter_groups`.
        groups: the norms of split weights are added up over the tensor group, the experts' over the group that
            DeepSpeed knows by the name of theirs: layers of several `ep_size` have several.
        max_norm: 0 does not clip.

    Returns:
        The norm before clipping, a scalar on the device; 0-d float32. Nothing is read back to the host.
    """
    whole: list[torch.Tensor] = []
    split: list[torch.Tensor] = []
    experts: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        kind = experts.setdefault(group["name"], []) if group["moe"] else split if group["split"] else whole
        kind.extend(p.grad for p in group["params"] if p.grad is not None)
    gradients = [*whole, *split, *chain(*experts.values())]
    square = _square_norm(whole, gradients[0].device)
    of_experts = [(parts, deepspeed_groups._get_expert_parallel_group(name)) for name, parts in experts.items()]
    for parts, handle in ((split, groups.handle("tensor")), *of_experts):
        part = _square_norm(parts, square.device)
        dist.all_reduce(part, group=handle)
        square += part
    norm = square.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm.float()


def _clip_before_each_step(engine: deepspeed.DeepSpeedEngine, groups: Groups, max_norm: float) -> None:
    """At ZeRO stage 0, clip when the engine steps, tell it the norm, and stop the step if that is not finite."""
    guard: UpdateGuard = engine.update_guard

    def clip(adam: torch.optim.Optimizer, *_: Any) -> None:
        guard.settle()  # for a loop that does not: the learning rate is read after this
        engine.optimizer._global_grad_norm = norm = clip_gradients(adam, groups, max_norm)
        guard.stop_unless_finite(adam, norm)

    inner_optimizer(engine).register_step_pre_hook(clip)


def _take_norms_in_pieces(optimizer: Any) -> None:
    """Let ZeRO see large gradients on a CPU as several of one parameter each when it takes the norm.

    It copies each to fp64, as a whole: of all experts of a layer, 16 MiB in bf16, that takes 34 ms, and 4 ms in pieces.
    The sum is the same.
    """
    whole = getattr(optimizer, "get_grad_norm_direct", None)
    if whole is None:  # another wrapper, which takes norms its own way
        return

    def in_pieces(gradients: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], *rest: Any) -> torch.Tensor:
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        pairs = [(piece, p) for gradient, p in zip(real, parameters, strict=False) for piece in _pieces(gradient)]
        return whole([piece for piece, _ in pairs], [p for _, p in pairs], *rest)

    optimizer.get_grad_norm_direct = in_pieces


def _pieces(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
    """On a CPU views of ELEMENTS_PER_PIECE, copies of which stay in the cache; anywhere else the gradient itself."""
    return gradient.flatten().split(ELEMENTS_PER_PIECE) if gradient.device.type == "cpu" else (gradient,)


def _forget_the_dry_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the step on zero gradients by which DeepSpeed's stage-0 bf16 wrapper makes Adam's state.

    It counts as a step in Adam's bias correction, and decays the master weights.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "fp32_groups"):
        return
    inner_optimizer(engine).state.clear()
    with torch.no_grad():
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def _square_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of squares of all elements, float64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":  # where an fp32 norm of 8 million numbers is off by 7e-5
        norms = [torch.linalg.vector_norm(piece.double()) for gradient in gradients for piece in _pieces(gradient)]
    else:
        norms = [norm.double() for norm in torch._foreach_norm([gradient.float() for gradient in gradients])]
    return torch.stack(norms).square().sum()
