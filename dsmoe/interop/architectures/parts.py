"""Keys and options that several architectures of the registry share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from dsmoe.config.sections.moe import ACTIVATION_SHAPES

Settings = Mapping[str, Any]
"""A Hugging Face config with all of its defaults."""

Count = Annotated[int, Field(ge=0, le=65_536)]
LayerIndex = Annotated[int, Field(ge=0, le=10_000)]

HIDDEN_ACT = {name: shape.hidden_act for name, shape in ACTIVATION_SHAPES.items() if shape.hidden_act is not None}
"""For each gated activation of dsmoe's, Hugging Face's name of the gate's function."""


def activation_of(settings: Settings) -> str:
    """Return dsmoe's name of a config's gated activation."""
    return next(ours for ours, theirs in HIDDEN_ACT.items() if theirs == settings["hidden_act"])


@dataclass(frozen=True)
class Need:
    """The values that an architecture allows for an option, and why."""

    key: str
    allowed: tuple[object, ...]
    reason: str


HAS_EXPERTS = (
    Need("moe.router.choice", ("token",), "its tokens choose their experts"),
    Need("moe.router.force_balanced", (False,), "it goes by the scores"),
    Need("moe.residual", (False,), "it has no residual MLP mixed in by learned coefficients"),
    Need("moe.activation", tuple(HIDDEN_ACT), "its experts are gated"),
)
SOFTMAX = (
    Need("moe.router.score", ("softmax",), "its scores are a softmax over the experts"),
    Need("moe.router.scale", (1.0,), "it has no factor on its router weights"),
    Need("moe.router.num_groups", (1,), "its experts stand in no groups"),
    Need("moe.balance.bias_update_rate", (0.0,), "it has no selection bias"),
    Need("moe.shared_expert_ffn_size", (None,), "it has no shared expert that is simply added"),
)
