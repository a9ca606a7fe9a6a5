"""Any activation checkpointing of a user's: gradients are those without it, and everything is counted once.

No `context_fn`, no call of the layer's own: the user's code is that for DeepSpeed's layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import dsmoe
from dsmoe.moe import begin_step, update_routers
from dsmoe.moe.replay import Draws, uniform
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D, E, T = 16, 8, 24
Function = Callable[[torch.Tensor], torch.Tensor]
Results = dict[str, torch.Tensor]


def deepspeeds(function: Function, x: torch.Tensor) -> torch.Tensor:
    deepspeed.checkpointing.configure(None, partition_activations=False, contiguous_checkpointing=False)
    return deepspeed.checkpointing.checkpoint(function, x)


KEPT = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "_softmax", "topk", "sigmoid")]
KINDS: dict[str, Callable[[Function, torch.Tensor], torch.Tensor]] = {
    "deepspeed": deepspeeds,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant, generator not restored": functools.partial(checkpoint, use_reentrant=True, preserve_rng_state=False),
    "not reentrant, generator not restored": functools.partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False
    ),
    "selective": functools.partial(
        checkpoint, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, KEPT)
    ),
}
TIGHT = {"capacity_factor": 0.5, "min_capacity": 1}
OPTIONS: list[dict[str, Any]] = [
    {"noise": "gumbel", "k": 2},
    {"noise": "jitter", "k": 1, "use_residual": True},
    {"noisy_gate_policy": "RSample", "k": 1, "drop_tokens": True, **TIGHT},
    {
        "noise": "gumbel",
        "k": 2,
        "drop_policy": "random",
        "score": "sigmoid",
        "num_groups": 2,
        "top_k_groups": 2,
        **TIGHT,
    },
    {"drop_policy": "random", "k": 2, "renormalize_dropped": True, "shared_expert_ffn_size": 8, **TIGHT},
    {"drop_policy": "position", "k": 2, "recompute_experts": True, "target_drop_percent": 5.0, **TIGHT},
    {"noise": "jitter", "choice": "expert", "k": 1, "capacity_factor": 1.0},
    {"noise": "gumbel", "k": 2, "scope": "global", "bias_update_rate": 0.01},
    {"k": 2, "scope": "sequence"},
]


class WithDropout(nn.Module):
    """Draws from torch's generator, which torch's checkpointing restores."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


def make_layer(options: dict[str, Any], experts: str = "stacked", ep_size: int = 1) -> dsmoe.MoE:
    torch.manual_seed(0)
    expert: dict[str, Any] = {"expert_ffn_size": 24} if experts == "stacked" else {"expert": WithDropout()}
    if experts != "stacked":
        options = {key: value for key, value in options.items() if key != "recompute_experts"}
    defaults = {"capacity_factor": None, "eval_capacity_factor": 1.0, "aux_loss": 0.1, "z_loss": 0.01, "seed": 5}
    layer = moe_layer(D, num_experts=E, ep_size=ep_size, **{**defaults, **expert, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            seed = sum(map(ord, name))
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return layer


def micro_batches() -> list[torch.Tensor]:
    """Four: of different lengths, the third the same as the first to the last bit."""
    batches = [torch.randn(2, T, D, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 1, 3)]
    batches[3] = batches[3][:, : T // 2]
    return [batch.requires_grad_() for batch in batches]


def pass_twice(layer: dsmoe.MoE) -> Function:
    """What is done to a micro-batch: the layer is used twice, and what follows it keeps a tensor for its gradient."""

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x + layer(torch.tanh(x))[0]
        return torch.tanh(x + layer(x)[0])

    return function


def train(layer: dsmoe.MoE, run: Callable[[Function, torch.Tensor], torch.Tensor], order: str) -> Results:
    """A step of four micro-batches with an evaluation in between: all that comes of it."""
    begin_step([layer], 3)
    layer.zero_grad()
    inputs, outputs = micro_batches(), []
    function = pass_twice(layer)
    for x in inputs:
        outputs.append(run(function, x))
        with torch.no_grad():
            layer.eval()(x)
        layer.train()
    losses = [output.square().sum() for output in outputs]
    if order == "together":
        torch.stack(losses).sum().backward()
    else:
        for i in {"first to last": (0, 1, 2, 3), "mixed": (2, 0, 3, 1)}[order]:
            losses[i].backward()
    update_routers([layer])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    results |= {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    results |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    results["next pass"] = layer(inputs[0])[0].detach()
    return results


def assert_same(expected: Results, actual: Results) -> None:
    assert actual.keys() == expected.keys()
    assert {"input 0", "input 3", "deepspeed_moe.gate.wg.weight", "statistics.sums"} <= actual.keys()
    for name, value in expected.items():
        # The parts of a weight's gradient are added in another order; all else is the same to the bit.
        tolerance = 1e-5 if name.endswith(("weight", "bias", "gate_up", "down")) and name != "balance.bias" else 0.0
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def plainly(function: Function, x: torch.Tensor) -> torch.Tensor:
    return function(x)


def compare(ep_size: int, options: list[dict[str, Any]], kinds: list[str], order: str) -> None:
    """Every kind against none, on this rank; torch stops a recomputation early in one of two."""
    group = Groups(Topology(1, dist.get_world_size(), expert=ep_size)).expert_group() if dist.is_initialized() else None
    for case in options:
        for experts in ("stacked", "modules"):
            layer = make_layer(case, experts, ep_size)
            if group is not None:
                layer.set_expert_group(group)
            expected = train(layer, plainly, order)
            for number, kind in enumerate(kinds):
                for early_stop in (True, False) if number == 1 else (number % 2 == 0,):
                    layer = make_layer(case, experts, ep_size)
                    if group is not None:
                        layer.set_expert_group(group)
                    with set_checkpoint_early_stop(early_stop):
                        actual = train(layer, KINDS[kind], order)
                    try:
                        assert_same(expected, actual)
                    except AssertionError as error:
                        raise AssertionError(f"{case}, {experts}, {kind}, {order}: {error}") from None


@pytest.mark.parametrize("order", ["together", "first to last", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_and_counts_are_those_without_it(options: dict[str, Any], order: str) -> None:
    compare(1, [options], [kind for kind in KINDS if kind != "deepspeed"], order)


@pytest.mark.parametrize(("ep_size", "num_cases"), [(1, 2), (2, 4)])
def test_over_two_ranks_and_with_deepspeeds(ep_size: int, num_cases: int) -> None:
    cases = [OPTIONS[i] for i in (3, 4, 0, 5)[:num_cases]]
    run_ranks(2, compare, ep_size, cases, ["deepspeed", "reentrant", "not reentrant"], "mixed", timeout=400)


def nested(kind: str, innermost: str) -> Callable[[Function, torch.Tensor], torch.Tensor]:
    """A checkpoint in a checkpoint, with something before and behind it."""

    def run(function: Function, x: torch.Tensor) -> torch.Tensor:
        return KINDS[kind](lambda x: torch.tanh(KINDS[innermost](function, torch.tanh(x))), x)

    return run


NESTABLE = ["reentrant", "not reentrant", "reentrant, generator not restored"]


@pytest.mark.parametrize("innermost", NESTABLE)
@pytest.mark.parametrize("kind", NESTABLE)
def test_checkpoints_in_checkpoints(kind: str, innermost: str) -> None:
    expected = train(make_layer(OPTIONS[3]), lambda function, x: torch.tanh(function(torch.tanh(x))), "mixed")
    assert_same(expected, train(make_layer(OPTIONS[3]), nested(kind, innermost), "mixed"))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_layer_that_sees_the_same_tokens_twice_in_one_checkpoint(kind: str) -> None:
    """Both passes draw anew, and each is repeated as it was, although their tokens do not tell them apart."""
    results = []
    for run in (plainly, KINDS[kind]):
        layer = make_layer(OPTIONS[3])
        inputs = [torch.ones(T, D).mul(2.0).requires_grad_() for _ in range(3)]
        weight = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2))

        def block(x: torch.Tensor, layer: dsmoe.MoE = layer, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch.tanh(layer(x)[0] * weight[0] + layer(x)[0] * weight[1])

        outputs = [run(block, x) for x in inputs]
        assert not torch.equal(outputs[0], outputs[1])
        for i in (1, 2, 0):
            outputs[i].square().sum().backward()
        results.append([*(output.detach() for output in outputs), *(x.grad for x in inputs), layer.statistics.sums])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_a_graph_that_goes_backward_twice() -> None:
    gradients = []
    for run in (plainly, KINDS["not reentrant"]):
        layer, x = make_layer(OPTIONS[3]), micro_batches()[0]
        output = run(pass_twice(layer), x).square().sum()
        gradients += [torch.autograd.grad(output, x, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_recomputation_that_rounds_differently_draws_the_same() -> None:
    """As compiled code does, which is not the same with and without gradients."""
    layer, x = make_layer(OPTIONS[0]), micro_batches()[0]
    layer(torch.randn(T, D))
    seen = []
    layer.router.register_forward_hook(lambda _, __, routing: seen.append(routing.experts_TK))

    def block(x: torch.Tensor) -> torch.Tensor:
        rounded = x if not torch.is_grad_enabled() else x * (1 + 2**-12)
        return layer(rounded)[0]

    checkpoint(block, x, use_reentrant=True).sum().backward()
    first, again = seen
    assert (first == again).all(1).float().mean() > 0.95, "another draw has few of the same choices"


class TestDraws:
    def test_a_pass_that_nobody_noted_is_a_new_one(self) -> None:
        """As in a custom function that calls the layer in its backward pass only."""
        layer = make_layer(OPTIONS[0])
        x = torch.randn(4, D, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: layer(grad.detach())[0])
        y.sum().backward()
        assert layer._draws.count == 1

    def test_old_passes_are_forgotten(self) -> None:
        draws, x = Draws(capacity=3), torch.randn(8, 5, D)
        keys = [int(draws.begin(1, tokens, True)) for tokens in x]
        assert len(set(keys)) == 8
        found: list[int] = []
        y = torch.ones(1, requires_grad=True) * 1
        y.register_hook(lambda _: found.extend(int(draws.begin(1, tokens, True)) for tokens in x[[7, 6]]))
        y.sum().backward()
        assert found == [keys[7], keys[6]]

    def test_uniform_numbers_are_uniform_and_independent(self) -> None:
        """Kolmogorov-Smirnov at the 0.1 % level, and no correlation between neighbours, keys, or rows."""
        keys = torch.arange(40)
        drawn = torch.stack([uniform(key, (5000,), torch.device("cpu")) for key in keys])
        assert drawn.min() > 0.0
        assert drawn.max() < 1.0
        ordered = drawn.flatten().sort().values
        expected = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
        assert (ordered - expected).abs().max() < 1.95 / ordered.numel() ** 0.5
        centred = (drawn - 0.5) * 12**0.5
        bound = 4.0 / 5000**0.5
        for lag in (1, 2, 3, 8):
            assert (centred[:, lag:] * centred[:, :-lag]).mean(1).abs().max() < bound
        across = centred @ centred.T / 5000 - torch.eye(40)
        assert across.fill_diagonal_(0.0).abs().max() < 1.2 * bound

    @pytest.mark.parametrize("count", [0, 1, 2, 7])
    def test_uniform_numbers_do_not_depend_on_how_many_are_drawn(self, count: int) -> None:
        key = torch.tensor(-5)
        assert torch.equal(uniform(key, (count,), key.device), uniform(key, (8,), key.device)[:count])
