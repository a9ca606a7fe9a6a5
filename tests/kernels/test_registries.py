"""What has no kernel is refused by name, and what a kernel has no branch for does not compile."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.errors import TritonError

from dsmoe.config.sections.moe import ActivationShape
from dsmoe.kernels.topk_router import _Route, route
from dsmoe.kernels.weighted_activation import weighted_activation, weighted_activation_backward
from dsmoe.nn.activations import Activation
from tests.helpers import made_up_entries
from tests.helpers.layer_options import moe_layer
from tests.kernels import test_weighted_activation
from tests.kernels.test_kernel_layer import outcome, use_kernels
from tests.moe import DEVICE

pytestmark = pytest.mark.usefixtures("made_up_entries")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"score": "softplus"},
            r"'softplus' of dsmoe.moe.scores.SCORES has no Triton kernel: add a branch for it to "
            r"dsmoe.kernels.topk_router, forward and backward, and give the entry the code .* as `kernel`",
        ),
        (
            {"activation": "tanh_glu"},
            r"'tanh_glu' of dsmoe.nn.activations.ACTIVATIONS has no Triton kernel: add a branch for it to "
            r"dsmoe.kernels.weighted_activation, forward and backward, and give the entry the code .* as `kernel`",
        ),
    ],
)
def test_a_layer_refuses_what_has_no_kernel(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = moe_layer(16, num_experts=4, k=2, expert_ffn_size=8, seed=0, **options).to(DEVICE)
    use_kernels(monkeypatch, False)
    layer(torch.randn(5, 16, device=DEVICE))[0].sum().backward()
    use_kernels(monkeypatch, True)
    with pytest.raises(NotImplementedError, match=message):
        layer(torch.randn(5, 16, device=DEVICE))


@pytest.mark.parametrize("activation", [made_up_entries.TANH, made_up_entries.TANH_GLU], ids=lambda entry: entry.name)
def test_the_activations_functions_refuse_it(activation: Activation) -> None:
    for run in calls(activation):
        with pytest.raises(NotImplementedError, match=f"'{activation.name}' of .* has no Triton kernel"):
            run()


@pytest.mark.parametrize("gated", [True, False])
def test_a_code_without_a_branch_does_not_compile(gated: bool) -> None:
    for run in calls(replace(made_up_entries.TANH, shape=ActivationShape(gated), kernel="tanh")):
        assert_refused(run, "activation tanh")


def assert_refused(run: Callable[[], object], name: str) -> None:
    with pytest.raises(TritonError) as caught:
        run()
    # Of a function within a kernel, the compiler has it as the cause.
    assert f"this kernel has no branch for the {name}" in "".join(traceback.format_exception(caught.value))


def calls(activation: Activation) -> list[Callable[[], object]]:
    z_NZ = torch.randn(4, 32 if activation.gated else 16, device=DEVICE)
    grad_NI, weight_N = torch.randn(4, 16, device=DEVICE), torch.rand(4, device=DEVICE)
    ends_L = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    return [
        lambda: weighted_activation(z_NZ, weight_N, ends_L, activation),
        lambda: weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, activation),
    ]


def test_a_score_without_a_branch_does_not_compile() -> None:
    score = replace(made_up_entries.SOFTPLUS, kernel="softplus")
    logits_TE = torch.randn(4, 8, device=DEVICE)
    assert_refused(lambda: route(logits_TE, None, None, 2, score, True, 1.0, 1e-20), "score softplus")
    scores_TE, experts_TK = logits_TE.sigmoid(), torch.tensor([[0, 1]] * 4, device=DEVICE)
    context = SimpleNamespace(saved_tensors=(scores_TE, experts_TK), rule=("softplus", True, 1.0, 1e-20))
    grads = torch.ones_like(scores_TE), torch.ones(4, 2, device=DEVICE)
    assert_refused(lambda: _Route.backward(context, *grads, None), "score softplus")


def test_a_layer_of_other_entries_computes_the_same_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "score": "sigmoid",
        "noise": "contrary",
        "num_groups": 2,
        "group_score": "min",
        "drop_policy": "last",
        "capacity_factor": 0.6,
        "activation": "relu2_glu",
    }
    use_kernels(monkeypatch, False)
    plain = outcome(options, masked=True)
    use_kernels(monkeypatch, True)
    fused = outcome(options, masked=True)
    for key, expected in plain.items():
        torch.testing.assert_close(fused[key], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_made_of_a_kernels_function_has_a_kernel(dtype: torch.dtype) -> None:
    for num_rows, inner in test_weighted_activation.SHAPES:
        test_weighted_activation.test_kernels_are_their_twin("relu2_glu", num_rows, inner, dtype)
