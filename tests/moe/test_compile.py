"""torch.compile of the layer, of a model and of DeepSpeed's engine: the numbers are those of uncompiled code.

Several batches of several shapes, forward and backward, as a training loop has them; the first graph that torch.compile
makes is for one shape, and the second already has a variable in its place. Inductor is tried once.
"""

from __future__ import annotations

from shutil import which
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsmoe.moe import grouped_ffn
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D, E = 16, 4
SHAPES = [(2, 6), (2, 5), (3, 7), (1, 1), (2, 6)]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


class Model(nn.Module):
    """A layer between two others; with `recompute` it is computed again in the backward pass."""

    def __init__(self, modules: bool = False, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        experts: dict[str, Any] = {"expert": Expert()} if modules else {"expert_ffn_size": 24}
        self.before, self.recompute = nn.Linear(D, D), recompute
        self.moe = moe_layer(D, num_experts=E, seed=0, **{"k": 2, "aux_loss": 0.1, **experts, **options})
        nn.init.normal_(self.moe.router.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.before(x))
        if self.recompute:
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.moe(torch.tanh(x))[0])


def tokens(seed: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(model: Model, run: Any, mark: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Everything that comes of a pass over each shape."""
    results = []
    for step, shape in enumerate(SHAPES):
        model.moe.begin_step(step)
        model.zero_grad()
        x = tokens(step, shape, dtype).requires_grad_()
        if mark and shape != (1, 1):  # 1 is a shape of its own
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        output = run(x)
        output.square().sum().backward()
        gradients = [p.grad.clone() if p.grad is not None else torch.zeros(()) for p in model.parameters()]
        results += [output.detach(), x.grad, *gradients, model.moe.statistics.sums.clone()]
    return results


def assert_compiles(
    mark: bool = False, dtype: torch.dtype = torch.float32, backend: str = "aot_eager", **options: Any
) -> None:
    arguments = {key: options.pop(key) for key in ("dynamic", "fullgraph") if key in options}
    torch._dynamo.reset()
    model = Model(**options).to(dtype)
    expected = train(model, model, dtype=dtype)
    model = Model(**options).to(dtype)
    actual = train(model, torch.compile(model, backend=backend, **arguments), mark, dtype)
    for mine, theirs in zip(actual, expected, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if mine.dtype != torch.bfloat16 else {}
        torch.testing.assert_close(mine, theirs, **tolerance)


WAYS: list[dict[str, Any]] = [
    {"drop_tokens": False},
    {"capacity_factor": 0.5, "min_capacity": 1, "drop_policy": "position"},
    {"modules": True, "drop_tokens": False, "k": 1},
    {"modules": True, "capacity_factor": 0.5, "min_capacity": 1, "use_residual": True},
    {"drop_policy": "random", "noise": "gumbel", "capacity_factor": 0.5, "min_capacity": 1, "recompute": True},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_batches_of_several_shapes(options: dict[str, Any]) -> None:
    for how in ({}, {"dynamic": True}, {"mark": True}):
        assert_compiles(**how, **options)


GROUPED: list[dict[str, Any]] = [
    {"drop_tokens": False, "shared_expert_ffn_size": 8},
    {"capacity_factor": 0.5, "min_capacity": 1},
    {"capacity_factor": 0.5, "min_capacity": 1, "drop_policy": "position", "renormalize_dropped": True},
]


@pytest.mark.parametrize(("options", "mark"), [(GROUPED[0], False), (GROUPED[1], True), (GROUPED[2], False)], ids=str)
def test_on_a_gpus_way_shapes_are_variables_of_one_graph(
    options: dict[str, Any], mark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    assert_compiles(mark, torch.bfloat16, fullgraph=True, dynamic=None if mark else True, **options)


def test_a_compiled_recomputation_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled inside of a checkpoint, one graph serves both passes; outside of it the checkpoint is in the graph."""
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    counted = []
    for inside in (None, True, False):
        torch._dynamo.reset()
        model = Model(recompute=True, drop_tokens=False).bfloat16()
        x = tokens(0, (2, 6), torch.bfloat16).requires_grad_()
        run: Any = model
        if inside is True:
            model.inner = torch.compile(model.inner, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
        elif inside is False:
            run = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            run(x).square().sum().backward()
        counted.append([model.moe.statistics.sums, x.grad, model.moe.router.weight.grad])
    assert counted[0][0][:E].sum() == 2 * 12 * 2
    for actual in counted[1:]:
        torch.testing.assert_close(actual, counted[0])


def test_a_factor_that_moves_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_ffn, "_Looped", grouped_ffn._Grouped)
    torch._dynamo.reset()
    layer = moe_layer(D, num_experts=E, k=2, expert_ffn_size=8, min_capacity=1, target_drop_percent=50.0, seed=0)
    compiled = torch.compile(layer.bfloat16(), backend="aot_eager", dynamic=True)
    kept = []
    for factor in (1.0, 0.5, 0.25):
        assert layer.limit.controller is not None
        layer.limit.controller.factor = factor
        layer.begin_step(0)
        compiled(tokens(1, (2, 16), torch.bfloat16))
        kept.append(layer.statistics.sums[E : 2 * E].max().item())
    assert kept == [16, 8, 4]


@pytest.mark.skipif(which("gcc") is None and which("g++") is None, reason="Inductor needs a compiler of C++")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(" " in torch.__file__, reason="Inductor gives the compiler torch's folder unquoted")
def test_with_inductor() -> None:
    assert_compiles(backend="inductor", drop_tokens=False)


def losses_of_an_engine(compiled: bool, ep_size: int, options: dict[str, Any]) -> list[float]:
    torch._dynamo.reset()
    model = Model(ep_size=ep_size, **options)
    parameters = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(parameters), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if compiled:
        engine.compile(backend="aot_eager")
    losses = []
    for step, shape in enumerate(SHAPES[:3]):
        model.moe.begin_step(step)
        loss = engine(tokens(2 * step + dist.get_rank(), shape)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def engines(cases: list[tuple[int, dict[str, Any]]]) -> None:
    for ep_size, options in cases:
        expected, actual = (losses_of_an_engine(compiled, ep_size, options) for compiled in (False, True))
        assert actual == pytest.approx(expected, rel=1e-5), (ep_size, options)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_engine_that_is_compiled(num_ranks: int) -> None:
    """Both kinds of experts, with and without a capacity, chunks and noise, over as many expert ranks."""
    ways = [WAYS[1], WAYS[2]]
    if num_ranks == 2:
        ways += [{"drop_tokens": False, "overlap_chunks": 2, "noise": "jitter"}]
    run_ranks(num_ranks, engines, [(num_ranks, options) for options in ways], timeout=400)


def over_tensor_ranks() -> None:
    groups = Groups(Topology(1, 2, tensor=2, expert=2))
    for options in ({"drop_tokens": False, "shared_expert_ffn_size": 8}, WAYS[1]):
        results = []
        for compiled in (False, True):
            torch._dynamo.reset()
            model = Model(ep_size=2, tensor_group=groups.tensor_group(sequence=True), **options)
            model.moe.set_expert_group(groups.expert_group())
            results.append(train(model, torch.compile(model, backend="aot_eager") if compiled else model))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_over_tensor_ranks() -> None:
    run_ranks(2, over_tensor_ranks, timeout=400)
