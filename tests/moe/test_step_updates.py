"""What is done between the passes: biases, load shares and the capacity factor, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dsmoe
from dsmoe.moe import begin_step, hold_drop_rate, step_updates, update_routers
from dsmoe.moe.capacity import DropRateController
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D, E = 8, 4
RATE = 0.25
# CHOICES[rank][micro-batch]: the expert of each token. Loads over ranks 0 and 1: 6, 1, 3, 2; over all four: 8, 4, 8, 4.
CHOICES = [[[0, 0, 0], [0, 1, 2]], [[0, 0, 2], [2, 3, 3]], [[0, 0, 1], [1, 2, 2]], [[2, 2, 2], [1, 3, 3]]]


def chooser(**arguments: Any) -> dsmoe.MoE:
    """Token e_i has the logits e_i, times 4, so that it chooses expert i unless a bias of more than that says no."""
    layer = moe_layer(
        D, num_experts=E, expert_ffn_size=8, capacity_factor=None, normalize_weights=False, seed=0, **arguments
    )
    with torch.no_grad():
        layer.router.weight.copy_(4 * torch.eye(E, D))
    return layer


def tokens(choices: list[int]) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(choices), D).float()


def two_steps() -> dict[str, Any]:
    """Two layers take the step of CHOICES twice; the second has no state."""
    layers = [chooser(bias_update_rate=RATE, scope="global"), chooser()]
    layers.append(chooser(bias_update_rate=RATE / 2))
    num_calls = 0
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return all_reduce(*arguments, **keywords)

    step_updates.dist.all_reduce = counted  # this process is the test's own
    for step in range(2):
        begin_step(layers, step)
        for micro_batch in CHOICES[dist.get_rank()]:
            for layer in layers:
                layer(tokens(micro_batch))
        for layer in layers:
            layer.eval()(tokens([3, 3, 3, 3, 3]))
            layer.train()
        update_routers(layers)
    state = {
        f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.balance.state_dict().items()
    }
    return {"state": state, "calls": num_calls}


@pytest.mark.parametrize(
    ("ranks", "signs", "share"),
    [
        (1, [-1, 1, 1, 1], [4 / 6, 1 / 6, 1 / 6, 0]),
        (2, [-1, 1, 0, 1], [6 / 12, 1 / 12, 3 / 12, 2 / 12]),
        (4, [-1, 1, -1, 1], [8 / 24, 4 / 24, 8 / 24, 4 / 24]),
    ],
)
def test_bias_and_load_share_follow_from_the_loads_of_all_ranks(
    ranks: int, signs: list[int], share: list[float]
) -> None:
    """The mean load is 6/4, 3 and 6; scores are 0.9481 and 0.0173 each, so that two steps change no choice."""
    for result in run_ranks(ranks, two_steps):
        state = result["state"]
        assert set(state) == {"0.bias", "0.load_share", "2.bias"}
        assert state["0.bias"].tolist() == [2 * RATE * sign for sign in signs]
        assert state["2.bias"].tolist() == [RATE * sign for sign in signs]
        torch.testing.assert_close(state["0.load_share"], torch.tensor(share))
        assert result["calls"] == 2, "one all-reduce for all layers of a step"


def test_a_bias_moves_the_choice_and_not_the_weight() -> None:
    layer = chooser(bias_update_rate=1e-3)
    x = tokens([0, 1, 2])
    plain = layer(x)[0]
    layer.balance.bias[3] = 0.94
    assert layer(x)[2].tolist() == [0, 0, 0, 3]
    weights = layer.router(x, None, layer.balance.bias).weights_TK
    torch.testing.assert_close(weights, (4 * x[:, :E]).softmax(-1)[:, 3:])
    layer.balance.bias[3] = 0.92
    assert torch.equal(layer(x)[0], plain)


def test_an_expert_that_is_overloaded_loses_tokens_until_the_loads_are_even() -> None:
    torch.manual_seed(0)
    layer = moe_layer(
        D, num_experts=E, expert_ffn_size=8, k=2, capacity_factor=None, score="sigmoid", bias_update_rate=0.02, seed=0
    )
    with torch.no_grad():
        layer.router.weight.normal_(std=0.3)[:, 0] = torch.tensor([1.0, 0.3, -0.3, -1.0])
    x = torch.randn(400, D)
    x[:, 0] = 2.0
    loads = []
    for step in range(60):
        begin_step([layer], step)
        loads.append((layer(x)[2] / 200).tolist())
        update_routers([layer])
    assert max(loads[0]) > 1.9
    assert max(loads[-1]) < 1.1
    assert min(loads[-1]) > 0.9


def test_without_processes_this_process_is_all_there_is() -> None:
    layer = chooser(bias_update_rate=RATE)
    layer(tokens([0, 0, 1, 2]))
    update_routers([layer])
    assert layer.balance.bias.tolist() == [-RATE, 0.0, 0.0, RATE]


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_step_that_was_not_applied_moves_neither_bias_nor_load_share(applied: bool, on_device: bool) -> None:
    layer = chooser(bias_update_rate=RATE, scope="global")
    layer(tokens([0, 0, 1, 2]))
    update_routers([layer], torch.tensor(applied) if on_device else applied)
    assert layer.balance.bias.tolist() == ([-RATE, 0.0, 0.0, RATE] if applied else [0.0] * E)
    assert layer.balance.load_share.tolist() == ([0.5, 0.25, 0.25, 0.0] if applied else [0.25] * E)


def global_gradients(ranks: int) -> torch.Tensor:
    """The router's gradient of the global loss in the second of two steps, averaged over ranks and micro-batches."""
    layer = chooser(aux_loss=1.0, scope="global")
    every = [tokens(micro_batch) for rank in CHOICES for micro_batch in rank]
    mine = every[dist.get_rank() * len(every) // ranks : (dist.get_rank() + 1) * len(every) // ranks]
    layer.loss_scale = 1 / len(mine)
    gradients = []
    for step in range(2):
        layer.zero_grad()
        begin_step([layer], step)
        for x in mine:
            output, _, _ = layer(x)
            (0.0 * output).sum().backward()
        update_routers([layer])
        gradients.append(layer.router.weight.grad.clone())
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= ranks
    return torch.stack(gradients)


def test_the_global_loss_is_that_of_the_whole_batch_with_the_loads_of_the_step_before() -> None:
    whole = torch.cat([tokens(micro_batch) for rank in CHOICES for micro_batch in rank])
    weight = (4 * torch.eye(E, D)).requires_grad_()
    share = torch.tensor([8, 4, 8, 4]) / 24
    (E * (share * (whole @ weight.T).softmax(-1).mean(0)).sum()).backward()
    for ranks in (1, 2, 4):
        for gradients in run_ranks(ranks, global_gradients, ranks):
            torch.testing.assert_close(gradients[0], torch.zeros(E, D), rtol=0, atol=1e-6)  # even shares
            torch.testing.assert_close(gradients[1], weight.grad)


class TestPersistence:
    def test_a_layer_without_state_saves_none(self) -> None:
        assert not [name for name in chooser().state_dict() if name.startswith(("balance", "limit"))]

    def test_state_survives_a_cast_in_full(self) -> None:
        layer = chooser(bias_update_rate=1e-3, scope="global")
        layer.balance.bias[0] = 1 + 1e-3
        before = {name: value.clone() for name, value in layer.balance.state_dict().items()}
        layer.bfloat16().double().float()
        for name, value in layer.balance.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])

    def test_all_of_it_is_in_the_state_dict(self) -> None:
        arguments: dict[str, Any] = {"bias_update_rate": 0.1, "scope": "global"}
        layer, other = (
            moe_layer(D, num_experts=E, expert_ffn_size=8, seed=0, target_drop_percent=1.0, **arguments)
            for _ in range(2)
        )
        layer(torch.randn(30, D))
        update_routers([layer])
        hold_drop_rate([layer], 50.0)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.balance.bias, layer.balance.bias)
        assert torch.equal(other.balance.load_share, layer.balance.load_share)
        assert other.limit.factor == layer.limit.factor == 1.03


class TestDropRate:
    def test_the_factor_moves_a_percent_for_each_point_and_three_at_most(self) -> None:
        controller = DropRateController(1.0, target_percent=2.0, max_factor=1.5)
        factors = []
        for dropped in (2.0, 3.0, 30.0, 0.0, 2.0):
            controller.update(dropped)
            factors.append(controller.factor)
        assert factors == pytest.approx([1.0, 1.01, 1.01 * 1.03, 1.01 * 1.03 * 0.98, 1.01 * 1.03 * 0.98])

    def test_the_ceiling_holds(self) -> None:
        controller = DropRateController(1.4, target_percent=2.0, max_factor=1.5)
        for _ in range(10):
            controller.update(40.0)
        assert controller.factor == 1.5

    def test_holds_the_rate_of_a_skewed_layer(self) -> None:
        torch.manual_seed(0)
        layer = moe_layer(D, num_experts=E, expert_ffn_size=8, k=2, min_capacity=1, seed=0, target_drop_percent=5.0)
        nn.init.normal_(layer.router.weight)
        rates = []
        for step in range(60):
            begin_step([layer], step)
            layer(torch.randn(400, D) + 0.5)
            counted = dsmoe.moe.read_statistics(layer.statistics.sums, E)
            rates.append(100 - 100 * float(counted.kept_E.sum() / counted.assigned_E.sum()))
            hold_drop_rate([layer], rates[-1])
        assert rates[0] > 7.0
        assert sum(rates[-20:]) / 20 == pytest.approx(5.0, abs=0.7)
        assert layer.limit.eval_factor == 1.0

    def test_leaves_other_layers_alone(self) -> None:
        layer = moe_layer(D, num_experts=E, expert_ffn_size=8, capacity_factor=1.25, seed=0)
        hold_drop_rate([layer], 50.0)
        assert layer.limit.factor == 1.25
