"""A layer whose options are given by their keys alone, over DeepSpeed's defaults: for tests with tables of options."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

import dsmoe
from dsmoe.moe.deepspeed_arguments import DeepSpeedArguments, to_sections

LAYOUT = [field.name for field in fields(dsmoe.Layout)]


def moe_layer(
    hidden_size: int,
    expert: nn.Module | None = None,
    num_experts: int = 1,
    ep_size: int = 1,
    k: int = 1,
    **options: Any,
) -> dsmoe.MoE:
    """`dsmoe.MoE`; options of sections as `score="sigmoid"`, all others as DeepSpeed's layer has them.

    The schema does not check the options, so that tests can have registry entries that it does not name.
    """

    def taken(names: Any) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    of_router, of_balance, of_capacity, of_experts = (
        taken(kind.model_fields) for kind in (dsmoe.Router, dsmoe.Balance, dsmoe.Capacity, dsmoe.Experts)
    )
    layout = dsmoe.Layout(**taken(LAYOUT))
    given = DeepSpeedArguments(**taken(DeepSpeedArguments._fields))
    defaults = to_sections(k, expert, given, None, None, None, dsmoe.Experts().model_copy(update=of_experts))
    if of_router.get("choice") == "expert":
        of_router.setdefault("normalize_weights", False)
    return dsmoe.MoE(
        hidden_size,
        expert,
        num_experts,
        ep_size,
        k,
        router=defaults.router.model_copy(update=of_router),
        balance=defaults.balance.model_copy(update=of_balance),
        capacity=defaults.capacity.model_copy(update=of_capacity),
        experts=defaults.experts,
        layout=layout,
        **options,
    )
