"""`dsmoe.MoE` as the layer that a user of DeepSpeed puts into a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import dsmoe
from dsmoe.config import UserError
from dsmoe.config.schema import Moe
from dsmoe.model.transformer import Block, Transformer
from dsmoe.moe import LayerStatistics, read_statistics
from dsmoe.moe.capacity import renormalize
from dsmoe.moe.deepspeed_arguments import DeepSpeedArguments
from dsmoe.parallel import ExpertGroup, TensorGroup
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.helpers.moe_reference import Settings, run_reference
from tests.helpers.plan_configs import make_config

D, E = 16, 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))


class WithBiasApart(nn.Module):
    """Returns (output, bias), as Megatron's MLP does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), self.inner.bias


def make_layer(**arguments: Any) -> dsmoe.MoE:
    """Dropless, top-2 of 4 SwiGLU experts, with a router that decides clearly."""
    torch.manual_seed(0)
    defaults = {"num_experts": E, "k": 2, "capacity_factor": None, "eval_capacity_factor": None, "seed": 0}
    if "expert" not in arguments:
        defaults["expert_ffn_size"] = 24
    layer = moe_layer(D, **{**defaults, **arguments})
    nn.init.normal_(layer.router.weight)
    return layer


def statistics(layer: dsmoe.MoE) -> LayerStatistics:
    return read_statistics(layer.statistics.sums, layer.num_experts)


class TestDropIn:
    def test_is_deepspeeds_layer(self) -> None:
        assert isinstance(make_layer(), DeepSpeedMoE)

    def test_takes_every_argument_of_deepspeeds_with_its_default(self) -> None:
        theirs = inspect.signature(DeepSpeedMoE).parameters
        ours = inspect.signature(dsmoe.MoE).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind, name
            assert ours[name].default == (None if name == "expert" else parameter.default), name
        assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])

    def test_the_sections_stand_for_deepspeeds_defaults(self) -> None:
        theirs = inspect.signature(DeepSpeedMoE).parameters
        for name, default in DeepSpeedArguments._field_defaults.items():
            assert theirs[name].default == default, name

    def test_forward_takes_deepspeeds_arguments(self) -> None:
        theirs, ours = (inspect.signature(layer.forward).parameters for layer in (DeepSpeedMoE, dsmoe.MoE))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]

    def test_only_expert_parameters_are_marked_for_deepspeed(self) -> None:
        layer = make_layer(use_residual=True)
        marked = {name for name, parameter in layer.named_parameters() if not getattr(parameter, "allreduce", True)}
        assert marked == {"deepspeed_moe.experts.gate_up", "deepspeed_moe.experts.down"}
        assert {layer.get_parameter(name).group_name for name in marked} == {"ep_size_1"}

    def test_without_a_group_the_error_says_what_to_call(self) -> None:
        with pytest.raises(RuntimeError, match=r"ep_size 2 .* deepspeed.initialize or dsmoe.initialize"):
            make_layer(ep_size=2)(torch.randn(3, D))

    def test_use_tutel_is_accepted_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="use_tutel has no effect"):
            make_layer(use_tutel=True)


class TestUsersModule:
    @pytest.mark.parametrize("expert", [mlp(), WithBiasApart()], ids=["sequential", "tuple"])
    @pytest.mark.parametrize("factor", [None, 0.5])
    def test_equals_the_reference(self, expert: nn.Module, factor: float | None) -> None:
        layer = make_layer(expert=expert, capacity_factor=factor, min_capacity=1)
        x = torch.randn(16, D, requires_grad=True)
        output, _, counts = layer(x)
        output.square().sum().backward()

        exact = copy.deepcopy(layer).double()
        exact.zero_grad()
        x64 = x.detach().double().requires_grad_()

        def only_output(module: nn.Module, token: torch.Tensor) -> torch.Tensor:
            result = module(token)
            return result[0] if isinstance(result, tuple) else result

        expected = run_reference(
            x64,
            exact.router.weight,
            [lambda token, module=module: only_output(module, token) for module in exact.experts.deepspeed_experts],
            Settings(top_k=2, capacity=16 if factor is None else 4),
        )
        expected.output.square().sum().backward()
        torch.testing.assert_close(output, expected.output.float())
        torch.testing.assert_close(x.grad, x64.grad.float(), rtol=1e-4, atol=1e-5)
        for name, parameter in exact.named_parameters():
            grad = layer.get_parameter(name).grad
            torch.testing.assert_close(grad, parameter.grad.float(), rtol=1e-4, atol=1e-5)
        assert counts.tolist() == expected.assigned

    def test_gives_zero_gradients_to_an_expert_that_nobody_chooses(self) -> None:
        layer = make_layer(expert=mlp(), num_experts=3, k=1)
        with torch.no_grad():
            layer.router.weight.zero_()[2] = 1.0
        layer(torch.ones(5, D))[0].sum().backward()
        for idle in layer.experts.deepspeed_experts[:2]:
            assert all(parameter.grad is not None and not parameter.grad.any() for parameter in idle.parameters())

    def test_is_copied_not_used_itself(self) -> None:
        expert = mlp()
        before = expert[0].weight.clone()
        layer = make_layer(expert=expert)
        assert torch.equal(expert[0].weight, before)
        assert not {id(p) for p in expert.parameters()} & {id(p) for p in layer.parameters()}


class TestInitialWeights:
    @pytest.mark.parametrize("users", [True, False])
    def test_experts_differ_and_follow_from_their_global_id(self, users: bool) -> None:
        (whole,) = run_ranks(1, build_experts, 1, users)
        halves = run_ranks(2, build_experts, 2, users)
        for stacked in whole.values():
            for one in range(E):
                assert all(not torch.equal(stacked[one], stacked[other]) for other in range(one))
        for name, stacked in whole.items():
            torch.testing.assert_close(torch.cat([half[name] for half in halves]), stacked, rtol=0, atol=0)

    def test_the_seed_decides(self) -> None:
        first, again, other = make_layer(seed=3), make_layer(seed=3), make_layer(seed=4)
        assert torch.equal(first.experts.gate_up, again.experts.gate_up)
        assert not torch.equal(first.experts.gate_up, other.experts.gate_up)

    def test_drawing_a_users_experts_leaves_torchs_generator_alone(self) -> None:
        expert = mlp()
        torch.manual_seed(5)
        expected = torch.rand(3)
        layer = dsmoe.MoE(D, expert, E, seed=1)
        torch.manual_seed(5)
        layer.reset_experts(seed=2)
        assert torch.equal(torch.rand(3), expected)

    def test_can_be_made_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            layer = moe_layer(D, expert_ffn_size=8, num_experts=E)
        assert layer.experts.gate_up.is_meta

    def test_another_place_in_the_group_draws_that_places_experts(self) -> None:
        whole, half = make_layer(), make_layer(ep_size=2)
        half.set_expert_group(ExpertGroup(None, 2, 1, (True, True)))
        assert torch.equal(half.experts.down, whole.experts.down[2:])


def build_experts(ep_size: int, users: bool) -> dict[str, torch.Tensor]:
    layer = make_layer(ep_size=ep_size, seed=7, **({"expert": mlp()} if users else {}))
    if not users:
        return {name: parameter.detach() for name, parameter in layer.experts.named_parameters()}
    each = [dict(expert.named_parameters()) for expert in layer.experts.deepspeed_experts]
    return {name: torch.stack([parameters[name].detach() for parameters in each]) for name in each[0]}


class TestResidual:
    @pytest.mark.parametrize("users", [True, False])
    def test_mixes_experts_and_dense_by_learned_weights(self, users: bool) -> None:
        layer = make_layer(use_residual=True, **({"expert": mlp()} if users else {}))
        x = torch.randn(2, 5, D)
        mixed, _, _ = layer(x)
        layer.use_residual = False
        experts_alone, _, _ = layer(x)
        weight, bias = layer.coefficient.weight, layer.coefficient.bias
        mix = torch.exp(x @ weight.T + bias)
        mix = mix / mix.sum(-1, keepdim=True)
        torch.testing.assert_close(mixed, experts_alone * mix[..., :1] + layer.mlp(x) * mix[..., 1:])

    @pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
    def test_the_mlp_is_like_one_expert(self, activation: str) -> None:
        layer = make_layer(use_residual=True, activation=activation, num_experts=1, k=1)
        with torch.no_grad():
            layer.mlp.gate_up.weight.copy_(layer.experts.gate_up[0])
            layer.mlp.down.weight.copy_(layer.experts.down[0])
        x = torch.randn(5, D)
        torch.testing.assert_close(layer(x)[0], layer.mlp(x), msg="a mix of two equals is either")


class TestSharedExpert:
    @pytest.mark.parametrize("users", [True, False])
    def test_is_added(self, users: bool) -> None:
        layer = make_layer(shared_expert_ffn_size=40, **({"expert": mlp()} if users else {}))
        x = torch.randn(2, 5, D)
        output, _, _ = layer(x)
        shared, layer.shared = layer.shared, None
        torch.testing.assert_close(output, layer(x)[0] + shared(x))
        assert shared.down.weight.shape == (D, 40)

    def test_does_not_go_with_a_residual_mlp(self) -> None:
        with pytest.raises(UserError, match=r"residual \(true\) and shared_expert_ffn_size \(8\) both add"):
            make_layer(shared_expert_ffn_size=8, use_residual=True)


@pytest.mark.parametrize("arguments", [{"use_residual": True}, {"shared_expert_ffn_size": 8}])
class TestWhatEveryTokenPasses:
    def test_is_zero_for_masked_tokens(self, arguments: dict[str, Any]) -> None:
        used = torch.tensor([1, 0, 1])
        output, _, _ = make_layer(**arguments)(torch.randn(3, D), used)
        assert output.any(dim=1).tolist() == [True, False, True]

    def test_is_dense_to_deepspeed_by_mark_and_by_name(self, arguments: dict[str, Any]) -> None:
        """DeepSpeed reduces by the mark, and leaves parameters with "expert" in their name out of its checkpoints."""
        named = dict(make_layer(**arguments).named_parameters())
        experts = {name for name in named if ".experts." in name}
        assert {name for name, parameter in named.items() if hasattr(parameter, "group_name")} == experts
        assert len(named) > len(experts) + 1
        assert not any("expert" in name for name in named.keys() - experts)


class TestNoise:
    @pytest.mark.parametrize("policy", ["Jitter", "RSample"])
    def test_is_in_training_only(self, policy: str) -> None:
        layer, quiet = make_layer(noisy_gate_policy=policy), make_layer()
        x = torch.randn(64, D)
        assert not torch.equal(layer(x)[0], layer(x)[0])
        torch.testing.assert_close(layer.eval()(x)[0], quiet.eval()(x)[0], rtol=0, atol=0)

    @pytest.mark.parametrize(("theirs", "ours"), [("Jitter", "jitter"), ("RSample", "gumbel"), ("None", "none")])
    def test_deepspeeds_names_mean_the_same(self, theirs: str, ours: str) -> None:
        x = torch.randn(64, D)
        assert torch.equal(make_layer(noisy_gate_policy=theirs)(x)[0], make_layer(noise=ours)(x)[0])

    def test_gumbel_chooses_at_random_in_proportion_to_the_scores(self) -> None:
        layer = make_layer(noise="gumbel", k=1, normalize_weights=False)
        with torch.no_grad():
            layer.router.weight.zero_()[0] = torch.log(torch.tensor(3.0)) / D
        _, _, counts = layer(torch.ones(6000, D))
        shares = counts / 6000  # scores are 3/6, 1/6, 1/6, 1/6
        torch.testing.assert_close(shares, torch.tensor([3, 1, 1, 1]) / 6, rtol=0, atol=0.03)

    def test_gumbel_weighs_by_the_scores_without_noise(self) -> None:
        layer = make_layer(noise="gumbel", k=1, normalize_weights=False)
        x = torch.randn(32, D)
        routing = layer.router(x)
        clean = (x @ layer.router.weight.T).softmax(-1)
        assert (routing.experts_TK[:, 0] != clean.argmax(-1)).any()
        torch.testing.assert_close(routing.weights_TK, clean.gather(1, routing.experts_TK))

    def test_jitter_moves_the_input_by_at_most_a_hundredth(self) -> None:
        layer = make_layer(noise="jitter", num_experts=1, k=1)
        with torch.no_grad():
            layer.router.weight.zero_()[0, 0] = 1.0
        logits = layer.router(torch.ones(5000, D)).logits_TE
        torch.testing.assert_close(logits.amin(), torch.tensor(0.99), rtol=0, atol=1e-4)
        torch.testing.assert_close(logits.amax(), torch.tensor(1.01), rtol=0, atol=1e-4)
        assert logits.mean().item() == pytest.approx(1.0, abs=5e-4)

    def test_without_noise_the_layer_repeats_itself(self) -> None:
        layer, x = make_layer(noisy_gate_policy="None"), torch.randn(64, D)
        assert torch.equal(layer(x)[0], layer(x)[0])


RANDOM = [
    {"noise": "jitter"},
    {"noise": "gumbel"},
    {"drop_policy": "random", "capacity_factor": 0.5, "min_capacity": 1},
    {"noise": "gumbel", "drop_policy": "random", "capacity_factor": 0.5, "min_capacity": 1},
]


@pytest.mark.parametrize("arguments", RANDOM)
class TestRandomDraws:
    """They follow from the layer's seed, the step, the pass and the rank, and from nothing else."""

    def test_follow_from_the_step_and_the_pass(self, arguments: dict[str, Any]) -> None:
        layer, again, x = make_layer(**arguments), make_layer(**arguments), torch.randn(64, D)
        outputs = {}
        for step in (3, 4):
            layer.begin_step(step)
            outputs[step] = [layer(x)[0] for _ in range(2)]
        different = [*outputs[3], *outputs[4]]
        assert all(not torch.equal(one, other) for i, one in enumerate(different) for other in different[:i])
        torch.rand(5)  # torch's own generator plays no part
        again.begin_step(4)  # as after a resume
        assert [torch.equal(again(x)[0], output) for output in outputs[4]] == [True, True]

    def test_follow_from_the_seed(self, arguments: dict[str, Any]) -> None:
        x = torch.randn(64, D)
        layer, other = make_layer(**arguments), make_layer(**arguments, seed=1)
        other.load_state_dict(layer.state_dict())
        assert not torch.equal(layer(x)[0], other(x)[0])

    def test_leave_torchs_generator_alone(self, arguments: dict[str, Any]) -> None:
        layer, x = make_layer(**arguments), torch.randn(64, D)
        before = torch.get_rng_state()
        layer(x)
        assert torch.equal(torch.get_rng_state(), before)

    def test_evaluation_repeats_itself_and_disturbs_nothing(self, arguments: dict[str, Any]) -> None:
        arguments = {**arguments, "eval_capacity_factor": arguments.get("capacity_factor")}
        layer, undisturbed, x = make_layer(**arguments), make_layer(**arguments), torch.randn(64, D)
        layer.begin_step(2)
        first = layer.eval()(x)[0]
        layer.begin_step(3)
        assert torch.equal(layer(x)[0], first)
        undisturbed.begin_step(3)
        assert torch.equal(layer.train()(x)[0], undisturbed(x)[0])


def test_ranks_draw_differently() -> None:
    first, second = run_ranks(2, noisy_counts)
    assert not torch.equal(first, second)


def noisy_counts() -> torch.Tensor:
    layer = make_layer(noise="gumbel", k=1)
    torch.manual_seed(3)
    return layer(torch.randn(64, D))[2]


class TestForceBalanced:
    @pytest.mark.parametrize("training", [True, False])
    def test_every_expert_has_the_same_load(self, training: bool) -> None:
        layer = make_layer(num_experts=6, k=3, force_balanced=True).train(training)
        _, _, counts = layer(torch.randn(20, D))
        assert counts.tolist() == [10] * 6
        used = torch.arange(20) % 5 != 2
        assert layer(torch.randn(20, D), used)[2].tolist() == [8] * 6

    def test_no_token_has_an_expert_twice_and_weights_are_the_scores(self) -> None:
        layer, x = make_layer(num_experts=6, k=4, force_balanced=True, normalize_weights=False), torch.randn(7, D)
        routing = layer.router(x)
        assert all(len(set(row)) == 4 for row in routing.experts_TK.tolist())
        torch.testing.assert_close(
            routing.weights_TK, (x @ layer.router.weight.T).softmax(-1).gather(1, routing.experts_TK)
        )


class TestRandomDrops:
    def test_every_assignment_has_the_same_chance(self) -> None:
        """10 equal tokens for an expert that takes 4: over 500 passes each stays in 200, give or take."""
        layer = make_layer(num_experts=2, k=1, drop_policy="random", capacity_factor=0.8, min_capacity=1)
        with torch.no_grad():
            layer.router.weight.zero_()[1] = 1.0
        x = torch.ones(10, D)
        kept = torch.stack([layer(x)[0].any(dim=1) for _ in range(500)])
        assert (kept.sum(dim=1) == 4).all(), "exactly the capacity"
        assert ((kept.sum(dim=0) - 200).abs() < 45).all(), "four standard deviations"

    def test_a_kept_choice_of_no_weight_cannot_take_the_dropped_ones(self) -> None:
        """Logits 0 and -200: the second choice's weight is 0 in fp32, and the first choice of the last is dropped."""
        layer = make_layer(
            num_experts=2, drop_policy="position", capacity_factor=0.5, min_capacity=1, renormalize_dropped=True
        )
        with torch.no_grad():
            layer.router.weight.zero_()[1] = -200.0 / D
        x, used = torch.ones(3, D, requires_grad=True), torch.tensor([True, True, True])
        routing = layer.router(x, used)
        assignments = dataclasses.replace(
            layer.limit(routing, torch.tensor([3, 3]), None), kept_A=torch.tensor([True, True, False] + [True] * 3)
        )
        weights = renormalize(routing.weights_TK, assignments)
        weights.sum().backward()
        assert weights.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
        assert layer.router.weight.grad.isfinite().all()

    def test_without_drops_nothing_is_drawn(self) -> None:
        x = torch.randn(32, D)
        layer = make_layer(drop_policy="random")
        assert torch.equal(layer(x)[0], make_layer()(x)[0])


class TestCapacity:
    def test_drop_tokens_false_is_dropless(self) -> None:
        layer = make_layer(drop_tokens=False, capacity_factor=0.1, eval_capacity_factor=0.1, min_capacity=1)
        x = torch.randn(32, D)
        expected = make_layer()(x)[0]
        assert torch.equal(layer(x)[0], expected)
        assert torch.equal(layer.eval()(x)[0], expected)

    def test_training_and_evaluation_have_their_own_factor(self) -> None:
        layer = make_layer(capacity_factor=0.25, eval_capacity_factor=None, min_capacity=1)
        x = torch.randn(32, D)
        assert not layer(x)[0].any(dim=1).all()
        assert torch.equal(layer.eval()(x)[0], make_layer()(x)[0])

    def test_deepspeeds_defaults_drop_at_factor_one(self) -> None:
        layer = dsmoe.MoE(D, mlp(), num_experts=E)
        with torch.no_grad():
            layer.router.weight.zero_()[1] = 1.0
        x = torch.ones(40, D)
        output, _, counts = layer(x)
        assert counts.tolist() == [0, 40, 0, 0]
        assert output.any(dim=1).tolist() == [True] * 10 + [False] * 30


EXPERTS_CHOOSE = dsmoe.Router(choice="expert", normalize_weights=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ep_size": 3}, r"ep_size \(3\) must divide num_experts \(4\)"),
        ({"expert": mlp()}, "either expert .* or experts=.*expert_ffn_size.* not both"),
        ({"experts": None}, "either expert .* or experts=.*expert_ffn_size"),
        ({"experts": dsmoe.Experts(expert_ffn_size=8, residual=True, shared_expert_ffn_size=8)}, "both add a dense"),
        ({"experts": dsmoe.Experts(expert_ffn_size=12)}, r"expert_ffn_size \(12\) must be a multiple of 8 .* 8 or 16"),
        ({"router": dsmoe.Router(num_groups=3)}, r"router.num_groups \(3\) must divide num_experts \(4\)"),
        (
            {"router": dsmoe.Router(num_groups=2, top_k_groups=3)},
            r"router.top_k_groups \(3\) must be at most router.num_groups \(2\)",
        ),
        ({"router": dsmoe.Router(num_groups=2), "k": 3}, r"top_k \(3\) must fit into the router.top_k_groups"),
        ({"router": dsmoe.Router(num_groups=4, normalize_weights=False), "k": 1}, "top2_sum.* needs 2 experts"),
        (
            {"router": dsmoe.Router(), "k": 1},
            r"normalize_weights \(true\) with top_k \(1\) makes every weight 1",
        ),
        ({"k": 5}, r"top_k \(5\) must be at most num_experts \(4\)"),
        ({"k": 0}, "k must be a whole number of at least 1, not 0"),
        ({"k": 2.0}, r"k must be a whole number of at least 1, not 2\.0"),
        ({"capacity_factor": 0.0}, r"capacity_factor must be a number above 0, or None for no limit, not 0\.0"),
        ({"min_capacity": -1}, "min_capacity must be a whole number of at least 0, not -1"),
        (
            {"capacity_factor": 2.0, "capacity": dsmoe.Capacity()},
            r"capacity_factor \(2\.0\) and capacity= say",
        ),
        ({"drop_tokens": False, "capacity": dsmoe.Capacity()}, r"drop_tokens \(False\) and capacity= say the same"),
        ({"noisy_gate_policy": "Jitter", "router": dsmoe.Router()}, r"noisy_gate_policy \('Jitter'\) and router= say"),
        ({"noisy_gate_policy": "jitter"}, "noisy_gate_policy must be one of .* not 'jitter'"),
        (
            {"capacity": dsmoe.Capacity(target_drop_percent=1.0)},
            r"capacity.target_drop_percent \(1\) needs a capacity.factor to begin with",
        ),
        (
            {"capacity": dsmoe.Capacity(factor=3.0, target_drop_percent=1.0)},
            r"capacity.factor \(3\) must be at most capacity.max_factor \(2\)",
        ),
        ({"router": dsmoe.Router(choice="expert")}, "router.normalize_weights .* has no meaning with router.choice"),
        (
            {"router": EXPERTS_CHOOSE, "capacity": dsmoe.Capacity(factor=1.0)},
            r"capacity.eval_factor \(null\) must be set with router.choice: expert",
        ),
        (
            {"router": EXPERTS_CHOOSE, "balance": dsmoe.Balance(bias_update_rate=0.1)},
            r"balance.bias_update_rate \(0\.1\) has no meaning with router.choice: expert",
        ),
        (
            {
                "router": EXPERTS_CHOOSE,
                "capacity": dsmoe.Capacity(factor=1.0, eval_factor=1.0, target_drop_percent=1.0),
            },
            r"capacity.target_drop_percent \(1\.0\) has no meaning with router.choice: expert",
        ),
        ({"eval_capacity_factor": float("nan")}, "eval_capacity_factor must be a number above 0"),
        ({"min_capacity": None}, "min_capacity must be a whole number of at least 0, not None"),
        ({"layout": {}}, r"layout must be a dsmoe\.Layout\(\.\.\.\), not \{\}"),
        ({"capacity": 0}, r"capacity must be a dsmoe\.Capacity\(\.\.\.\), not 0"),
        ({"router": "sigmoid"}, r"router must be a dsmoe\.Router\(\.\.\.\), not 'sigmoid'"),
        ({"balance": {"aux_loss": 0.1}}, r"balance must be a dsmoe\.Balance\(\.\.\.\), not \{'aux_loss': 0\.1\}"),
        ({"experts": Moe(num_experts=8, expert_ffn_size=8)}, "experts is the section moe as a whole"),
        (
            {
                "experts": dsmoe.Experts(expert_ffn_size=16, shared_expert_ffn_size=9),
                "layout": dsmoe.Layout(tensor_group=TensorGroup(None, 2, 0)),
            },
            r"shared_expert_ffn_size \(9\) must be a multiple of tensor \(2\); the next is 10",
        ),
        ({"expert": "mlp", "experts": None}, "expert must be a torch.nn.Module, not 'mlp'"),
        (
            {"expert": mlp(), "experts": None, "layout": dsmoe.Layout(expert_tensor=2)},
            r"expert_tensor \(2\) cuts stacked experts only",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dsmoe.MoE(D, **{"num_experts": E, "k": 2, "experts": dsmoe.Experts(expert_ffn_size=24), **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dsmoe.Router(score="tanh"), r"Router: score \('tanh'\): Input should be 'softmax' or 'sigmoid'"),
        (lambda: dsmoe.Router(scores="softmax"), "Router: scores: unknown; did you mean 'score'"),
        (lambda: dsmoe.Balance(aux_loss=-0.1), r"Balance: aux_loss \(-0\.1\): .* greater than or equal to 0"),
        (lambda: dsmoe.Balance(z_loss=float("nan")), r"Balance: z_loss \(nan\)"),
        (lambda: dsmoe.Capacity(factor=float("inf")), r"Capacity: factor \(inf\)"),
        (lambda: dsmoe.Capacity(drop_policy="last"), r"Capacity: drop_policy \('last'\)"),
        (lambda: dsmoe.Experts(expert_ffn_size=-8), r"Experts: expert_ffn_size \(-8\)"),
        (lambda: dsmoe.Layout(overlap_chunks=0), "overlap_chunks must be a whole number of at least 1, not 0"),
        (lambda: dsmoe.Layout(expert_tensor=None), "expert_tensor must be a whole number of at least 1, not None"),
        (lambda: dsmoe.Layout(tensor_group=2), r"tensor_group must be groups.tensor_group\(\) or left out, not 2"),
        (lambda: dsmoe.Layout(recompute_experts="yes"), "recompute_experts must be True or False, not 'yes'"),
        (lambda: dsmoe.Layout(max_tokens=0), "max_tokens must be a whole number of at least 1, not 0"),
    ],
)
def test_wrong_options_are_refused_where_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_expert_tensor_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_groups, "mpu", object())
    with pytest.raises(ValueError, match="enable_expert_tensor_parallelism is not supported"):
        make_layer(enable_expert_tensor_parallelism=True)


class TestMask:
    @pytest.mark.parametrize("used", [torch.ones(1), torch.ones(()), torch.ones(6, 2), torch.ones(11)], ids=str)
    def test_of_another_shape_is_refused(self, used: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"used_token has shape .* give one value per token"):
            make_layer()(torch.randn(2, 6, D), used)

    @pytest.mark.parametrize("arguments", [{}, {"shared_expert_ffn_size": 8}, {"use_residual": True}], ids=str)
    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_what_a_masked_token_holds_goes_nowhere(self, arguments: dict[str, Any], poison: float) -> None:
        layer = make_layer(**arguments, aux_loss=0.1, z_loss=0.1)
        x, used = torch.randn(6, D), torch.arange(6) != 2
        results = []
        for value in (0.0, poison):
            layer.zero_grad()
            layer.statistics.clear()
            filled = torch.where(used[:, None], x, value).requires_grad_()
            output, aux_loss, _ = layer(filled, used)
            output.sum().backward()
            gradients = [filled.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
            results.append([output, aux_loss, layer.statistics.sums.clone(), *gradients])
        for clean, poisoned in zip(*results, strict=True):
            assert torch.equal(clean, poisoned)


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"hidden_states has width {D + 1}, and this MoE layer hidden_size {D}"):
        make_layer()(torch.randn(3, D + 1))


@pytest.mark.parametrize("users", [False, True])
def test_a_layer_can_be_pickled(users: bool) -> None:
    layer = make_layer(**({"expert": mlp(), "expert_ffn_size": None} if users else {"activation": "relu2"}))
    again, x = pickle.loads(pickle.dumps(layer)), torch.randn(6, D)
    assert torch.equal(again(x)[0], layer(x)[0])
    assert all(hasattr(parameter, "group_name") for parameter in again.experts.parameters())


def test_new_parameters_of_to_empty_are_marked() -> None:
    with torch.device("meta"):
        layer = make_layer()
    layer.to_empty(device="cpu")
    assert all(hasattr(parameter, "group_name") for parameter in layer.experts.parameters())


class TestShapes:
    @pytest.mark.parametrize("shape", [(6, D), (2, 3, D), (3, 2, 1, D)])
    def test_leading_dimensions_do_not_matter(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(6, D)
        output, _, _ = make_layer()(x.view(shape))
        assert output.shape == shape
        assert torch.equal(output.view(6, D), make_layer()(x)[0])

    @pytest.mark.parametrize("used", [torch.tensor([[1, 0, 1], [0, 1, 1]]), torch.tensor([1, 0, 1, 0, 1, 1]).bool()])
    def test_used_token_may_be_flat_or_shaped_like_the_tokens(self, used: torch.Tensor) -> None:
        layer, x = make_layer(), torch.randn(2, 3, D)
        output, _, counts = layer(x, used)
        assert output.any(dim=-1).flatten().tolist() == [True, False, True, False, True, True]
        assert counts.sum() == 4 * 2
        torch.testing.assert_close(output[0, 2], layer(x[0, 2:])[0][0])

    def test_input_that_is_not_contiguous(self) -> None:
        layer, x = make_layer(), torch.randn(3, 2, D)
        torch.testing.assert_close(layer(x.transpose(0, 1))[0], layer(x.transpose(0, 1).contiguous())[0])

    @pytest.mark.parametrize("arguments", [{}, {"expert": mlp()}, {"capacity_factor": 1.0}])
    def test_no_tokens_at_all(self, arguments: dict[str, Any]) -> None:
        layer = make_layer(aux_loss=0.1, z_loss=0.1, **arguments)
        output, aux_loss, counts = layer(torch.zeros(0, D, requires_grad=True))
        output.sum().backward()
        assert output.shape == (0, D)
        assert (aux_loss.item(), counts.tolist()) == (0.0, [0] * E)
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
        assert layer.statistics.sums.isfinite().all()


class TestStatistics:
    def layer(self) -> dsmoe.MoE:
        """Token (a, b, ...) has logits (a, b, 0); each expert takes at most 2 of a micro-batch's tokens."""
        layer = make_layer(num_experts=3, k=1, capacity_factor=0.01, min_capacity=2, normalize_weights=False)
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[0, 0] = layer.router.weight[1, 1] = 1.0
        return layer

    @staticmethod
    def tokens(*logits: tuple[float, float]) -> torch.Tensor:
        x = torch.zeros(len(logits), D)
        x[:, :2] = torch.tensor(logits)
        return x

    def test_are_the_sums_of_two_micro_batches(self) -> None:
        layer = self.layer()
        first = self.tokens((2, 0), (2, 0), (1, 0), (0, 3))
        second = self.tokens((0, 3), (2, 0))
        score = lambda a, b: torch.tensor([a, b, 0.0]).exp() / torch.tensor([a, b, 0.0]).exp().sum()  # noqa: E731
        two, one, three = score(2, 0), score(1, 0), score(0, 3)
        layer(first)
        layer(second)
        counted = statistics(layer)
        assert counted.assigned_E.tolist() == [4, 2, 0]
        assert counted.kept_E.tolist() == [3, 2, 0]
        assert (counted.tokens, counted.micro_batches) == (6, 2)
        assert counted.slots == 3 * 2 + 3 * 2
        torch.testing.assert_close(counted.score_E.float(), 3 * two + one + 2 * three)
        assert counted.weight == pytest.approx(float(3 * two.max() + one.max() + 2 * three.max()))
        assert counted.dropped_weight == pytest.approx(float(one.max()))
        balance_first = 3 * (3 / 4 * (2 * two + one + three)[0] + 1 / 4 * (2 * two + one + three)[1]) / 4
        balance_second = 3 * (1 / 2 * (two + three)[0] + 1 / 2 * (two + three)[1]) / 2
        assert counted.balance_loss == pytest.approx(float(balance_first + balance_second), rel=1e-5)

    def test_do_not_count_evaluation(self) -> None:
        layer = self.layer().eval()
        layer(self.tokens((2, 0)))
        assert not layer.statistics.sums.any()

    def test_do_not_count_masked_tokens(self) -> None:
        masked, short = self.layer(), self.layer()
        masked(self.tokens((2, 0), (9, 9), (0, 3), (9, 9)), torch.tensor([1, 0, 1, 0]))
        short(self.tokens((2, 0), (0, 3)))
        torch.testing.assert_close(masked.statistics.sums, short.statistics.sums)

    def test_dropless_slots_are_the_assignments(self) -> None:
        layer = make_layer()
        layer(torch.randn(7, D))
        assert statistics(layer).slots == 7 * 2

    def test_clear_starts_from_zero(self) -> None:
        layer = self.layer()
        layer(self.tokens((2, 0)))
        layer.statistics.clear()
        layer(self.tokens((0, 3)))
        assert statistics(layer).assigned_E.tolist() == [0, 1, 0]

    def test_are_not_saved(self) -> None:
        assert not [name for name in make_layer().state_dict() if "statistics" in name]

    def test_count_once_under_recompute(self) -> None:
        counted = {}
        for recompute in ("none", "full"):
            config = make_config(moe={"num_experts": 4, "expert_ffn_size": 8}, train={"recompute": recompute})
            torch.manual_seed(0)
            model = Transformer(config, ExpertGroup.alone(), TensorGroup.alone())
            with set_checkpoint_early_stop(False):  # else torch happens to stop just before the counting
                model(torch.arange(30).view(2, 15)).sum().backward()
            counted[recompute] = [layer.statistics.sums for _, layer in model.moe_layers()]
        assert len(counted["full"]) == 3
        for once, again in zip(counted["none"], counted["full"], strict=True):
            assert once[:4].sum() == 2 * 14 * 2
            assert torch.equal(again, once)

    def test_count_once_where_a_user_checkpoints_a_block(self) -> None:
        config = make_config(moe={"num_experts": 4, "expert_ffn_size": 8})
        model = Transformer(config, ExpertGroup.alone(), TensorGroup.alone())
        block = model.blocks[0]
        assert isinstance(block, Block)
        x = torch.randn(1, 6, 8, requires_grad=True)
        with set_checkpoint_early_stop(False):
            checkpoint(block, x, model.rotary(6), use_reentrant=False).sum().backward()
        assert block.ffn.statistics.sums[:4].sum() == 6 * 2


class TestBf16:
    def test_close_calls_are_decided_in_fp32(self) -> None:
        """Logits 256, 256.25, 256.5, 256.75 in any order are all 256 to bf16."""
        layer = make_layer(k=1).bfloat16()
        orders = [torch.randperm(E) for _ in range(8)]
        x = torch.zeros(8, D)
        x[:, 0] = 1.0
        x[:, 1 : 1 + E] = torch.stack(orders) / 4
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:, 0] = 256.0
            layer.router.weight[:, 1 : 1 + E] = torch.eye(E)
        expected = [int(order.argmax()) for order in orders]
        assert layer.router(x.bfloat16()).experts_TK.flatten().tolist() == expected
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.float().router(x).experts_TK.flatten().tolist() == expected

    @pytest.mark.parametrize("arguments", [{}, {"expert": mlp()}, {"capacity_factor": 1.0}])
    def test_layer_is_near_its_fp32_self(self, arguments: dict[str, Any]) -> None:
        layer = make_layer(aux_loss=0.1, **arguments).bfloat16()
        x = torch.randn(32, D).bfloat16().requires_grad_()
        output, _, counts = layer(x)
        output.sum().backward()
        assert output.dtype == x.grad.dtype == torch.bfloat16
        assert all(parameter.grad.dtype == torch.bfloat16 for parameter in layer.parameters())
        exact, _, exact_counts = layer.float()(x.detach().float())
        assert torch.equal(counts, exact_counts)
        torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02 * exact.std().item())

    def test_counts_stay_exact(self) -> None:
        layer = make_layer().bfloat16()
        for _ in range(3):
            layer(torch.randn(301, D).bfloat16())
        counted = statistics(layer)
        assert counted.assigned_E.sum() == 3 * 301 * 2
        assert counted.tokens == 3 * 301
