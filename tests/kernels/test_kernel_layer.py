"""The whole layer with the kernels, beside their twins on the same device, and beside the layer as a CPU computes it.

Same choices, same drops, same numbers and gradients. What is drawn is another on each device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dsmoe.moe import balance, capacity, grouped_ffn, permutation, router
from dsmoe.nn import activations
from tests.helpers.layer_options import moe_layer
from tests.moe import DEVICE

T, D, E = 21, 16, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {"capacity_factor": None},
    "one expert each": {"k": 1, "normalize_weights": False},
    "probability": {"capacity_factor": 0.6},
    "position, renormalised": {"capacity_factor": 0.6, "drop_policy": "position", "renormalize_dropped": True},
    "random": {"capacity_factor": 0.6, "drop_policy": "random"},
    "DeepSeek-V3": {
        "score": "sigmoid",
        "scale": 2.5,
        "num_groups": 4,
        "top_k_groups": 2,
        "bias_update_rate": 0.1,
        "aux_loss": 0.1,
        "capacity_factor": None,
    },
    "gumbel, z-loss": {"noise": "gumbel", "z_loss": 0.1, "activation": "gelu"},
    "balanced by force": {"force_balanced": True, "activation": "relu2"},
    "experts choose": {"choice": "expert", "capacity_factor": 0.5, "normalize_weights": False, "activation": "geglu"},
    "a module's experts": {"expert": nn.Linear(D, D), "expert_ffn_size": None, "capacity_factor": 0.6},
    "shared expert": {"capacity_factor": None, "shared_expert_ffn_size": 24, "recompute_experts": True},
    "an expert without tokens": {"capacity_factor": None, "bias_update_rate": 0.1},
    "residual": {"k": 1, "use_residual": True, "activation": "gelu"},
}
DRAWN = ("random", "gumbel, z-loss")


def outcome(
    options: dict[str, Any], masked: bool, device: str = DEVICE, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    settings = {"k": 2, "expert_ffn_size": 8, **options}
    layer = moe_layer(D, num_experts=E, seed=3, **settings).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    # The router's weight stays fp32, as in training.
    layer.router.wg.weight = nn.Parameter(torch.randn(E, D, generator=generator).to(device))
    if layer.balance.bias is not None:
        layer.balance.bias.copy_(torch.linspace(-0.2, 0.2, E))
        layer.balance.bias[0] = -10.0  # nobody's choice
    x_TD = torch.randn(1, T, D, generator=generator).to(device, dtype).requires_grad_()
    used_T = torch.arange(T, device=device) % 4 != 1 if masked else None
    output, aux_loss, assigned_E = layer(x_TD, used_T)
    (output * torch.randn(output.shape, generator=generator).to(device, dtype)).sum().backward()
    found = {"output": output, "aux_loss": aux_loss, "assigned": assigned_E, "x": x_TD.grad}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


def use_kernels(monkeypatch: pytest.MonkeyPatch, used: bool) -> set[Any]:
    """As on a GPU, with the kernels or without them; the modules that have asked."""
    asked: set[Any] = set()
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    for module in (activations, balance, capacity, router, permutation):
        monkeypatch.setattr(module, "on_gpu", lambda tensor, module=module: bool(asked.add(module)) or used)
    return asked


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_change_nothing(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, False)
    plain = outcome(OPTIONS[name], masked)
    asked = use_kernels(monkeypatch, True)
    fused = outcome(OPTIONS[name], masked)
    assert asked == {balance, capacity, router, permutation} | (
        {activations} if "expert" not in OPTIONS[name] else set()
    )
    for key, expected in plain.items():
        torch.testing.assert_close(
            fused[key], expected, rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in DRAWN])
def test_the_device_gives_what_the_cpu_does(
    name: str, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(OPTIONS[name], masked, "cpu", dtype)
    if DEVICE == "cpu":
        use_kernels(monkeypatch, True)
    found = outcome(OPTIONS[name], masked, DEVICE, dtype)
    assigned, expected_assigned = found.pop("assigned").cpu(), expected.pop("assigned")
    assert torch.equal(assigned, expected_assigned)
    assert "bias_update_rate" not in OPTIONS[name] or assigned[0] == 0
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for key, theirs in expected.items():
        assert (found[key].cpu() - theirs).norm() <= tolerance * theirs.norm() + 1e-6, key
