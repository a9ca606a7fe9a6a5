"""The global gradient norm over every parameter once, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from dsmoe.engine import deepspeed_registry
from dsmoe.engine.optimizer_state import inner_optimizer
from dsmoe.engine.update_guard import UpdateGuard
from dsmoe.parallel.groups import Groups

ELEMENTS_PER_PIECE = 2**18
"""Elements of a gradient whose norm is taken at a time on a CPU."""


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
        # Whole: the same on all tensor ranks, so counted once. Split and experts: a part on each rank, so added up.
        kind = experts.setdefault(group["name"], []) if group["moe"] else split if group["split"] else whole
        kind.extend(p.grad for p in group["params"] if p.grad is not None)
    gradients = [*whole, *split, *chain(*experts.values())]
    square = _square_norm(whole, gradients[0].device)
    of_experts = [(parts, deepspeed_registry.expert_group(name)) for name, parts in experts.items()]
    # Also without parts: a rank that left out a collective would leave the others waiting.
    for parts, handle in ((split, groups.handle("tensor")), *of_experts):
        part = _square_norm(parts, square.device)
        dist.all_reduce(part, group=handle)
        square += part
    # The same on every rank from here on, so all of them scale, or stop, alike.
    norm = square.sqrt()
    if max_norm > 0:
        # Always, by 1 where nothing is clipped: a condition would read the norm. 1e-6 as in torch's own clipping.
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm.float()


def clip_before_each_step(engine: deepspeed.DeepSpeedEngine, groups: Groups, max_norm: float) -> None:
    """At ZeRO stage 0, clip when the engine steps, tell it the norm, and stop the step if that is not finite."""
    guard: UpdateGuard = engine.update_guard

    # In the inner optimizer's hook: only now have the masters their gradients, and the engine reads the wrapper's norm
    # after the step (0.19.8, runtime/engine.py:3518).
    def clip(adam: torch.optim.Optimizer, *_: Any) -> None:
        guard.settle()  # for a loop that does not: the learning rate is read after this
        engine.optimizer._global_grad_norm = norm = clip_gradients(adam, groups, max_norm)
        guard.stop_unless_finite(adam, norm)

    inner_optimizer(engine).register_step_pre_hook(clip)


def take_norms_in_pieces(optimizer: Any) -> None:
    """Hand ZeRO large gradients on a CPU in pieces when it takes the norm.

    It copies each to fp64, as a whole: of all experts of a layer, 16 MiB in bf16, that takes 34 ms, and 4 ms in pieces.
    The sum is the same.
    """
    whole = getattr(optimizer, "get_grad_norm_direct", None)
    if whole is None:  # another wrapper, which takes norms its own way
        return

    # Replaced on the object: ZeRO calls it by this name, and every other optimizer keeps its own.
    def in_pieces(gradients: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], *rest: Any) -> torch.Tensor:
        # As ZeRO pairs them (0.19.8, runtime/zero/stage_1_and_2.py:2677), before cutting: a piece has lost the mark.
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        pairs = [(piece, p) for gradient, p in zip(real, parameters, strict=False) for piece in _pieces(gradient)]
        # Each piece with its parameter, by whose marks ZeRO decides whether to count it on this tensor rank.
        return whole([piece for piece, _ in pairs], [p for _, p in pairs], *rest)

    optimizer.get_grad_norm_direct = in_pieces


def _pieces(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
    """On a CPU views of ELEMENTS_PER_PIECE, copies of which stay in the cache; anywhere else the gradient itself."""
    return gradient.flatten().split(ELEMENTS_PER_PIECE) if gradient.device.type == "cpu" else (gradient,)


def _square_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of squares of all elements, float64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":  # where an fp32 norm of 8 million numbers is off by 7e-5
        norms = [torch.linalg.vector_norm(piece.double()) for gradient in gradients for piece in _pieces(gradient)]
    else:
        norms = [norm.double() for norm in torch._foreach_norm([gradient.float() for gradient in gradients])]
    # In fp64, where no square overflows, and a large norm does not swallow the small ones.
    return torch.stack(norms).square().sum()
