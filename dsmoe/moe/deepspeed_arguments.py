"""Translation of DeepSpeed's arguments for an MoE layer into the sections of a config."""

from __future__ import annotations

import math
import warnings
from itertools import chain
from typing import Literal, NamedTuple

from torch import nn

from dsmoe.config import schema
from dsmoe.config.errors import UserError, refuse
from dsmoe.config.schema import Balance, Capacity, Experts, Moe, Router
from dsmoe.config.sections.moe import dense_path_problems, expert_choice_problems

_NOISE: dict[str | None, Literal["none", "jitter", "gumbel"]] = {
    None: "none",
    "None": "none",
    "Jitter": "jitter",
    "RSample": "gumbel",
}
"""The `noise` of dsmoe for DeepSpeed's `noisy_gate_policy`."""


class Sections(NamedTuple):
    """The sections of a config that define a layer."""

    router: Router
    balance: Balance
    capacity: Capacity
    experts: Experts


class DeepSpeedArguments(NamedTuple):
    """The arguments of `deepspeed.moe.layer.MoE` that a section can say as well, with their defaults."""

    capacity_factor: float | None = 1.0
    eval_capacity_factor: float | None = 1.0
    min_capacity: int = 4
    use_residual: bool = False
    noisy_gate_policy: str | None = None
    drop_tokens: bool = True


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse a value that is not a section of this kind.

    Raises:
        UserError: names the argument, the value and the type to give.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name} must be a dsmoe.{kind.__name__}(...), not {value!r}")


def check_switches(cuts_experts: bool, use_tutel: bool) -> None:
    """Refuse, or warn of, switches of DeepSpeed's layer that dsmoe's does not have.

    Args:
        cuts_experts: `enable_expert_tensor_parallelism` under tensor parallelism.
        use_tutel: `use_tutel`.

    Raises:
        UserError: experts are to be cut DeepSpeed's way.
    """
    if cuts_experts:
        raise UserError(
            "enable_expert_tensor_parallelism is not supported; set it to False, give Layout(expert_tensor=...)"
        )
    if use_tutel:
        warnings.warn("use_tutel has no effect: dsmoe has its own dispatch", stacklevel=3)


def to_sections(
    k: int,
    expert: nn.Module | None,
    given: DeepSpeedArguments,
    router: Router | None,
    balance: Balance | None,
    capacity: Capacity | None,
    experts: Experts | None,
) -> Sections:
    """Return the given sections, and the others made from DeepSpeed's arguments.

    Raises:
        UserError: an argument is out of range, or an argument and a section say the same thing.
    """
    for name, value in (("router", router), ("balance", balance), ("capacity", capacity), ("experts", experts)):
        if value is not None:
            check_kind(name, value, getattr(schema, name.capitalize()))
    if isinstance(experts, Moe):
        raise UserError("experts is the section moe as a whole, which has a number of experts of its own; give Experts")
    if given.noisy_gate_policy not in _NOISE:
        raise UserError(f"noisy_gate_policy must be one of {tuple(_NOISE)}, not {given.noisy_gate_policy!r}")
    if router is not None:
        _refuse_both("router", given, "noisy_gate_policy")
    if capacity is not None:
        _refuse_both("capacity", given, "capacity_factor", "eval_capacity_factor", "min_capacity", "drop_tokens")
    # DeepSpeed divides the chosen scores by their sum for k > 1 alone: the one of k = 1 would always be 1.
    router = router or Router(normalize_weights=k > 1, noise=_NOISE[given.noisy_gate_policy])
    balance = balance or Balance(aux_loss=0.0)
    capacity = capacity or _capacity(given)
    experts = experts or Experts()
    experts = experts.model_copy(update={"residual": experts.residual or given.use_residual})
    if (expert is None) == (experts.expert_ffn_size is None):
        raise UserError(
            "give either expert (a module of yours) or experts=dsmoe.Experts(expert_ffn_size=...) (stacked experts), "
            "and not both"
        )
    if expert is not None and not isinstance(expert, nn.Module):
        raise UserError(f"expert must be a torch.nn.Module, not {expert!r}")
    refuse(chain(dense_path_problems(experts), expert_choice_problems(router, balance, capacity)))
    if router.choice == "expert":  # nothing is dropped, and this policy sorts least
        capacity = capacity.model_copy(update={"drop_policy": "position"})
    return Sections(router, balance, capacity, experts)


def _capacity(given: DeepSpeedArguments) -> Capacity:
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(given, name)
        if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
            raise UserError(f"{name} must be a number above 0, or None for no limit, not {factor!r}")
    least = given.min_capacity
    if not isinstance(least, int) or least < 0:
        raise UserError(f"min_capacity must be a whole number of at least 0, not {least!r}")
    factors = (given.capacity_factor, given.eval_capacity_factor) if given.drop_tokens else (None, None)
    # No factor gives less than 1 for any token.
    return Capacity(factor=factors[0], eval_factor=factors[1], minimum=max(least, 1))


def _refuse_both(section: str, given: DeepSpeedArguments, *names: str) -> None:
    defaults = DeepSpeedArguments._field_defaults
    for name in names:
        if getattr(given, name) != defaults[name]:
            raise UserError(
                f"{name} ({getattr(given, name)!r}) and {section}= say the same thing; leave {name} out, and put it "
                f"into {section}=dsmoe.{section.capitalize()}(...)"
            )
