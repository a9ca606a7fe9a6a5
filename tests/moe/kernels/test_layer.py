"""The whole layer with the kernels in place of their twins: same choices, same drops, same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsmoe
from dsmoe.moe import balance, capacity, ffn, router, rows
from tests.moe.kernels import DEVICE

T, D, E = 21, 16, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {"capacity_factor": None},
    "one expert each": {"k": 1, "normalize_weights": False},
    "probability": {"capacity_factor": 0.6},
    "position, renormalised": {"capacity_factor": 0.6, "drop_policy": "position", "renormalize_dropped": True},
    "random": {"capacity_factor": 0.6, "drop_policy": "random"},
    "DeepSeek-V3": {
        "score": "sigmoid",
        "weight_scale": 2.5,
        "num_groups": 4,
        "top_k_groups": 2,
        "bias_update_rate": 0.1,
        "aux_loss": 0.1,
        "capacity_factor": None,
    },
    "gumbel, z-loss": {"noise": "gumbel", "z_loss": 0.1, "activation": "gelu"},
    "balanced by force": {"force_balanced": True, "activation": "relu2"},
    "experts choose": {"choice": "expert", "capacity_factor": 0.5, "normalize_weights": False, "activation": "geglu"},
}


def outcome(options: dict[str, Any], masked: bool) -> dict[str, torch.Tensor]:
    layer = dsmoe.MoE(D, num_experts=E, expert_ffn_size=8, seed=3, **{"k": 2, **options}).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(E, D, generator=generator))
    if layer.balance.bias is not None:
        layer.balance.bias.copy_(torch.linspace(-0.2, 0.2, E))
    x_TD = torch.randn(1, T, D, generator=generator).to(DEVICE).requires_grad_()
    used_T = torch.arange(T, device=DEVICE) % 4 != 1 if masked else None
    output, aux_loss, assigned_E = layer(x_TD, used_T)
    (output * torch.randn(output.shape, generator=generator).to(DEVICE)).sum().backward()
    found = {"output": output, "aux_loss": aux_loss, "assigned": assigned_E, "x": x_TD.grad}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_change_nothing(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    users = (balance, capacity, ffn, router, rows)
    monkeypatch.setattr(ffn, "_Looped", ffn._Grouped)
    for module in users:
        monkeypatch.setattr(module, "on_gpu", lambda tensor: False)
    plain = outcome(OPTIONS[name], masked)
    asked = set()
    for module in users:
        monkeypatch.setattr(module, "on_gpu", lambda tensor, module=module: bool(asked.add(module) or True))
    fused = outcome(OPTIONS[name], masked)
    assert asked == set(users)
    for key, expected in plain.items():
        torch.testing.assert_close(
            fused[key], expected, rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
