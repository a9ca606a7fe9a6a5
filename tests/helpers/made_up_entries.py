"""A score, activations, a drop policy, a group score and a noise that dsmoe does not have, as registry entries.

Their formulas once more, for results to be held against, are in the tests.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsmoe.config.sections.moe import ACTIVATION_SHAPES, ActivationShape
from dsmoe.moe.capacity import DROP_POLICIES, DropPolicy
from dsmoe.moe.router import Routing
from dsmoe.moe.scores import GROUP_SCORES, NOISES, SCORES, Noise, Score, over_their_sum
from dsmoe.nn.activations import ACTIVATIONS, Activation


def _tanh_slope(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * (1 - x.tanh() ** 2)


# Keeps the last in sequence order.
def _later(routing: Routing, _: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(routing.experts_TK.numel(), device=routing.experts_TK.device)


def _worst(preference_TGx: torch.Tensor) -> torch.Tensor:
    return preference_TGx.amin(dim=-1)


# Chooses the experts with the lowest scores.
def _contrary(logits_TE: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return -logits_TE


SOFTPLUS = Score("softplus", F.softplus, over_their_sum, kernel=None)
TANH = Activation("tanh", ActivationShape(gated=False), torch.tanh, _tanh_slope, kernel=None)
TANH_GLU = Activation("tanh_glu", ActivationShape(gated=True), torch.tanh, _tanh_slope, kernel=None)
RELU2_GLU = replace(ACTIVATIONS["relu2"], name="relu2_glu", shape=ActivationShape(gated=True))
"""Made of a function that the kernels have."""


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add all of them for the time of a test."""
    monkeypatch.setitem(SCORES, SOFTPLUS.name, SOFTPLUS)
    for activation in (TANH, TANH_GLU, RELU2_GLU):
        monkeypatch.setitem(ACTIVATION_SHAPES, activation.name, activation.shape)
        monkeypatch.setitem(ACTIVATIONS, activation.name, activation)
    monkeypatch.setitem(DROP_POLICIES, "last", DropPolicy(_later))
    monkeypatch.setitem(GROUP_SCORES, "min", _worst)
    monkeypatch.setitem(NOISES, "contrary", Noise(on_choice=_contrary))
