"""The experts' autograd function: both ways against plain autograd, in every activation, with gaps in the rows.

`_Looped` is the CPU's, `_Grouped` the device's, and what both are held against is computed on the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsmoe.moe.capacity import DROP_POLICIES, limit
from dsmoe.moe.grouped_ffn import ExpertRows, _Grouped, _Looped, expert_ffn
from dsmoe.moe.permutation import RowMap, gather_rows, gather_weights, sum_rows
from dsmoe.moe.router import Routing
from dsmoe.nn.activations import ACTIVATIONS
from tests.moe import DEVICE

T, D, E, K = 13, 16, 5, 2
INNER = 8
FORMULAS = {
    "swiglu": lambda z: F.silu(z[..., :INNER]) * z[..., INNER:],
    "geglu": lambda z: F.gelu(z[..., :INNER]) * z[..., INNER:],
    "gelu": F.gelu,
    "relu2": lambda z: F.relu(z) ** 2,
}


class Case:
    """Thirteen tokens; expert 3 is nobody's choice; `capacity` drops and `masked` leaves tokens out."""

    def __init__(
        self, activation: str, capacity: int | None, masked: bool, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

        self.activation = activation
        width = 2 * INNER if ACTIVATIONS[activation].gated else INNER
        self.inputs = [normal(T, D), normal(T, K), normal(E, width, D), normal(E, D, INNER)]
        scores_TE = torch.rand(T, E, generator=generator).to(device)
        scores_TE[:, 3] = -1
        experts_TK = scores_TE.topk(K).indices
        mask_T = torch.arange(T, device=device) % 4 != 1 if masked else None
        if mask_T is not None:
            experts_TK[~mask_T] = E
        routing = Routing(scores_TE, scores_TE, scores_TE, self.inputs[1], experts_TK, mask_T)
        assigned_E = torch.bincount(experts_TK.flatten(), minlength=E + 1)[:E]
        self.experts_TK = experts_TK
        self.assignments = limit(routing, assigned_E, capacity, DROP_POLICIES["position"])
        ends_L = self.assignments.kept_E.cumsum(0)
        self.row_map = RowMap.from_assignments(self.assignments, ends_L - self.assignments.kept_E, T * K)
        self.ends_L = ends_L.int()

    def rows(self, recompute: bool = False) -> ExpertRows:
        return ExpertRows(self.row_map, self.ends_L, ACTIVATIONS[self.activation], recompute)

    def run(self, way: type[torch.autograd.Function], recompute: bool = False) -> torch.Tensor:
        return way.apply(*self.inputs, self.rows(recompute))

    def plain(self) -> torch.Tensor:
        """A loop over the assignments that were kept, on the CPU."""
        x_TD, weights_TK, gate_up, down = (tensor.cpu() for tensor in self.inputs)
        out = [torch.zeros(D, dtype=x_TD.dtype) for _ in range(T)]
        kept = self.assignments.order_A[self.assignments.kept_A].tolist()
        for choice in kept:
            token, k = divmod(choice, K)
            expert = int(self.experts_TK[token, k])
            hidden = FORMULAS[self.activation](gate_up[expert] @ x_TD[token])
            out[token] = out[token] + weights_TK[token, k] * (down[expert] @ hidden)
        return torch.stack(out)

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor]:
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).to(output.device)
        return list(torch.autograd.grad(output, self.inputs, weight))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("way", "dtype", "device"),
    [(_Looped, torch.float64, "cpu"), (_Looped, torch.float32, "cpu"), (_Grouped, torch.float32, DEVICE)],
)
def test_both_ways_equal_a_loop_over_the_assignments(
    way: type[torch.autograd.Function],
    dtype: torch.dtype,
    device: str,
    activation: str,
    capacity: int | None,
    masked: bool,
) -> None:
    case = Case(activation, capacity, masked, dtype, device)
    output, expected = case.run(way), case.plain().to(device)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(case.gradients(output), case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not case.gradients(case.run(way))[2][3].any(), "an expert without rows has exactly no gradient"


WAYS = [(_Looped, "cpu"), (_Grouped, DEVICE)]


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recompute_changes_no_bit(
    way: type[torch.autograd.Function], device: str, capacity: int | None, activation: str
) -> None:
    case = Case(activation, capacity, True, torch.float32, device)
    kept, again = case.run(way), case.run(way, recompute=True)
    assert torch.equal(again, kept)
    for mine, theirs in zip(case.gradients(again), case.gradients(kept), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    case = Case(activation, 4, True, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: _Looped.apply(*inputs, case.rows()), case.inputs)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_near_float64(
    way: type[torch.autograd.Function], device: str, capacity: int | None, activation: str
) -> None:
    low = Case(activation, capacity, True, torch.float32, device)
    low.inputs = [p.detach().bfloat16().requires_grad_() for p in low.inputs]
    low.inputs[1] = low.inputs[1].detach().float().requires_grad_()  # router weights stay fp32
    case = Case(activation, capacity, True, torch.float64)
    case.inputs = [p.detach().cpu().double().requires_grad_() for p in low.inputs]
    exact, rounded = case.plain(), low.run(way)
    assert rounded.dtype == torch.bfloat16
    gradients = low.gradients(rounded)
    assert not any(gradient[3].any() for gradient in gradients[2:]), "an expert without rows has exactly no gradient"
    for mine, theirs in zip([rounded, *gradients], [exact, *case.gradients(exact)], strict=True):
        assert (mine.cpu() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("frozen", [(2,), (3,), (2, 3)])
def test_frozen_weights_change_no_other_gradient(
    way: type[torch.autograd.Function], device: str, frozen: tuple[int, ...]
) -> None:
    free, part = (Case("swiglu", 4, True, torch.float32, device) for _ in range(2))
    for index in frozen:
        part.inputs[index].requires_grad_(False)
    for case in (free, part):
        case.run(way).square().sum().backward()
    for index, (mine, theirs) in enumerate(zip(part.inputs, free.inputs, strict=True)):
        assert mine.grad is None if index in frozen else torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize(("recompute", "kept"), [(False, [(T * K, 2 * INNER)]), (True, [])])
def test_what_is_kept_for_the_backward_pass_is_the_source_and_the_preactivation(
    recompute: bool, kept: list[tuple[int, ...]]
) -> None:
    case = Case("swiglu", None, False, torch.float32, DEVICE)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_ffn(*case.inputs, case.rows(recompute))
    inputs = {tensor.data_ptr() for tensor in case.inputs}
    assert [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in inputs] == kept


def test_gathering_and_summing_are_transposes() -> None:
    case = Case("swiglu", 4, True, torch.float64)
    x_TD, weights_TK = case.inputs[:2]
    rows_ND = torch.randn(T * K, D, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, case.row_map), x_TD)
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, case.row_map), rows_ND)
    assert torch.autograd.gradcheck(lambda weights: gather_weights(weights, case.row_map), weights_TK)


def test_a_sum_leaves_out_what_has_no_row_also_where_no_list_of_rows_was_made() -> None:
    """As for float64 on a CUDA device, which the kernels do not take."""
    case = Case("swiglu", 4, True, torch.float64)
    rows_ND = torch.randn(T * K, D, dtype=torch.float64)
    assert not case.row_map.complete
    assert torch.equal(replace(case.row_map, bags=None).sum(rows_ND), case.row_map.sum(rows_ND))
