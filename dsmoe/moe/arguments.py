"""What `dsmoe.MoE` refuses: arguments that make no layer, or contradict each other."""

from __future__ import annotations

import math

from torch import nn

from dsmoe.parallel.groups import TensorGroup

_DEEPSPEED_NOISE = {None: "none", "None": "none", "Jitter": "jitter", "RSample": "gumbel"}
"""What DeepSpeed's `noisy_gate_policy` says, and what `noise` calls it."""


def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError for a size that is not a whole number of at least 1; None is no size."""
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_not_negative(**values: float) -> None:
    """Raise ValueError for a number that is negative, infinite or none at all."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


def check_experts(
    expert: nn.Module | None, expert_ffn_size: int | None, num_experts: int, ep_size: int, expert_tensor: int
) -> None:
    """Raise ValueError where the experts cannot be made or cut."""
    if ep_size < 1 or num_experts % ep_size:
        raise ValueError(f"ep_size ({ep_size}) must divide num_experts ({num_experts})")
    if (expert is None) == (expert_ffn_size is None):
        raise ValueError("give either expert (a module of yours) or expert_ffn_size (stacked experts), and not both")
    if expert is not None and not isinstance(expert, nn.Module):
        raise ValueError(f"expert must be a torch.nn.Module, not {expert!r}")
    if expert is not None and expert_tensor > 1:
        raise ValueError(f"expert_tensor ({expert_tensor}) cuts stacked experts only; give expert_ffn_size")


def check_dense(
    expert: nn.Module | None,
    use_residual: bool,
    shared_expert_ffn_size: int | None,
    tensor_group: TensorGroup | None,
) -> None:
    """Raise ValueError where what every token passes is asked for twice, or cannot be cut."""
    if use_residual and shared_expert_ffn_size is not None:
        raise ValueError(
            f"use_residual and shared_expert_ffn_size ({shared_expert_ffn_size}) both add a dense feed-forward "
            f"that every token passes; give one of them"
        )
    if use_residual and expert is not None and tensor_group is not None and tensor_group.size > 1:
        raise ValueError(f"use_residual over {tensor_group.size} tensor ranks needs expert_ffn_size, not expert")


def check_expert_choice(
    capacity_factor: float | None,
    eval_capacity_factor: float | None,
    target_drop_percent: float | None,
    bias_update_rate: float,
) -> None:
    """Raise ValueError for what makes no sense where experts choose."""
    if capacity_factor is None or eval_capacity_factor is None:
        raise ValueError("choice 'expert' needs capacity_factor and eval_capacity_factor: how many tokens one takes")
    if target_drop_percent is not None:
        raise ValueError("target_drop_percent has no meaning where choice is 'expert': nothing is dropped")
    if bias_update_rate:
        raise ValueError("bias_update_rate has no meaning where choice is 'expert': all take equally many tokens")


def one_noise(noise: str, noisy_gate_policy: str | None) -> str:
    """The noise that is asked for under our name, DeepSpeed's, or both."""
    if noisy_gate_policy not in _DEEPSPEED_NOISE:
        raise ValueError(f"noisy_gate_policy must be one of {tuple(_DEEPSPEED_NOISE)}, not {noisy_gate_policy!r}")
    theirs = _DEEPSPEED_NOISE[noisy_gate_policy]
    if "none" not in (noise, theirs) and noise != theirs:
        raise ValueError(f"noise {noise!r} and noisy_gate_policy {noisy_gate_policy!r} contradict each other")
    return theirs if noise == "none" else noise
