"""What is chosen by name: the schema and the registries have the same names, and an entry is all that a new one needs.

The made-up entries have no kernels; `kernels/test_registries.py` is about those.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any, get_args

import pytest
import torch
from torch import nn

import dsmoe
from dsmoe.config.sections import moe as schema
from dsmoe.moe import grouped_ffn
from dsmoe.moe.capacity import DROP_POLICIES
from dsmoe.moe.router import Router, Routing
from dsmoe.moe.scores import GROUP_SCORES, NOISES, SCORES
from dsmoe.nn.activations import ACTIVATIONS, find_activation
from tests.helpers.layer_options import moe_layer

T, D, E, K, INNER = 40, 16, 6, 2, 8


@pytest.mark.parametrize(
    ("section", "field", "registry"),
    [
        (schema.Router, "score", SCORES),
        (schema.Router, "group_score", GROUP_SCORES),
        (schema.Router, "noise", NOISES),
        (schema.Capacity, "drop_policy", DROP_POLICIES),
        (schema.Moe, "activation", ACTIVATIONS),
        (schema.Moe, "activation", schema.ACTIVATION_SHAPES),
        (schema.Router, "group_score", schema.LEAST_IN_GROUP),
    ],
)
def test_the_schema_has_the_names_of_the_registry(section: Any, field: str, registry: Any) -> None:
    assert get_args(section.model_fields[field].annotation) == tuple(registry)


def test_the_schema_says_what_is_gated() -> None:
    for registry in (SCORES, ACTIVATIONS):
        assert [entry.name for entry in registry.values()] == list(registry)
    gated = {name: activation.gated for name, activation in ACTIVATIONS.items()}
    assert gated == {"swiglu": True, "geglu": True, "gelu": False, "relu2": False}


def options(**values: Any) -> schema.Router:
    """Options that the schema does not know."""
    return schema.Router().model_copy(update=values)


def softplus(logits_TE: torch.Tensor) -> torch.Tensor:
    return (1 + logits_TE.exp()).log()


def route(router: Router, x_TD: torch.Tensor) -> Routing:
    torch.manual_seed(0)
    nn.init.normal_(router.weight)
    return router(x_TD)


@pytest.mark.usefixtures("made_up_entries")
@pytest.mark.parametrize("normalize", [True, False])
def test_a_score_needs_an_entry_only(normalize: bool) -> None:
    router = Router(D, E, K, options(score="softplus", normalize_weights=normalize, scale=1.5))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = route(router, x_TD)

    wide_TD, wide_ED = (tensor.detach().double().requires_grad_() for tensor in (x_TD, router.weight))
    scores_TE = softplus(wide_TD @ wide_ED.T)
    experts_TK = scores_TE.sort(dim=-1, descending=True).indices[:, :K]
    weights_TK = 1.5 * scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / scores_TE.gather(1, experts_TK).sum(-1, keepdim=True)
    probabilities_TE = scores_TE / scores_TE.sum(-1, keepdim=True)

    assert torch.equal(routing.experts_TK, experts_TK)
    found = (routing.scores_TE, routing.weights_TK, routing.probabilities_TE)
    expected = (scores_TE, weights_TK, probabilities_TE)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    upstream = [torch.linspace(-1, 2, tensor.numel()).view_as(tensor) for tensor in found]
    sum((mine * grad).sum() for mine, grad in zip(found, upstream, strict=True)).backward()
    sum((theirs * grad).sum() for theirs, grad in zip(expected, upstream, strict=True)).backward()
    for mine, theirs in ((x_TD, wide_TD), (router.weight, wide_ED)):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("made_up_entries")
def test_a_group_score_and_a_noise_need_an_entry_only() -> None:
    chosen = options(score="softplus", num_groups=2, top_k_groups=1, group_score="min", noise="contrary")
    router = Router(D, E, K, chosen)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        router.train(training)
        routing = route(router, x_TD)
        logits_TE = x_TD.double() @ router.weight.detach().double().T
        for logits_E, experts_K, weights_K in zip(
            logits_TE.tolist(), routing.experts_TK.tolist(), routing.weights_TK.tolist(), strict=True
        ):
            sign = -1 if training else 1
            group = max((range(3), range(3, 6)), key=lambda g: min(sign * logits_E[e] for e in g))
            best_K = sorted(group, key=lambda e: -sign * logits_E[e])[:K]
            scores_K = softplus(torch.tensor([logits_E[e] for e in best_K], dtype=torch.float64))
            assert experts_K == best_K
            assert weights_K == pytest.approx((scores_K / scores_K.sum()).tolist(), rel=1e-5)


def layer_of(activation: str, **options: Any) -> dsmoe.MoE:
    layer = moe_layer(D, num_experts=E, k=K, expert_ffn_size=INNER, seed=0, activation=activation, **options)
    nn.init.normal_(layer.router.weight)
    layer.reset_experts(0.3, 0.3)
    return layer


@pytest.mark.usefixtures("made_up_entries")
@pytest.mark.parametrize("way", [grouped_ffn._Looped, grouped_ffn._Grouped])
@pytest.mark.parametrize("activation", ["tanh", "tanh_glu", "relu2_glu"])
def test_an_activation_and_a_drop_policy_need_an_entry_only(
    activation: str, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_ffn, "_Looped", way)
    torch.manual_seed(0)
    options = {"score": "softplus", "drop_policy": "last", "capacity_factor": 0.6, "min_capacity": 1}
    layer = layer_of(activation, shared_expert_ffn_size=INNER, **options)
    x_TD = torch.randn(T, D).requires_grad_()
    output_TD = layer(x_TD)[0]

    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    wide_TD = x_TD.detach().double().requires_grad_()

    def feed_forward(x_D: torch.Tensor, gate_up_ZD: torch.Tensor, down_DI: torch.Tensor) -> torch.Tensor:
        z = gate_up_ZD @ x_D
        if activation == "tanh":
            return down_DI @ z.tanh()
        act = z[:INNER].tanh() if activation == "tanh_glu" else z[:INNER].clamp(min=0) ** 2
        return down_DI @ (act * z[INNER:])

    names = {name.rpartition("deepspeed_moe.")[2]: weight for name, weight in weights.items()}
    scores_TE = softplus(wide_TD @ names["gate.wg.weight"].T)
    experts_TK = scores_TE.sort(dim=-1, descending=True).indices[:, :K].tolist()
    expected = [feed_forward(x_D, names["shared.gate_up.weight"], names["shared.down.weight"]) for x_D in wide_TD]
    room = [8] * E  # 40 tokens * 2 / 6 experts * 0.6
    for token in reversed(range(T)):  # the last are kept
        for expert in experts_TK[token]:
            if room[expert] > 0:
                room[expert] -= 1
                weight = scores_TE[token, expert] / scores_TE[token, experts_TK[token]].sum()
                one = (names["experts.gate_up"][expert], names["experts.down"][expert])
                expected[token] = expected[token] + weight * feed_forward(wide_TD[token], *one)
    expected_TD = torch.stack(expected)
    assert room.count(0) >= E - 1, "the policy has something to drop"

    near = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(output_TD.double(), expected_TD, **near)
    upstream_TD = torch.linspace(-1, 2, T * D).view(T, D)
    (output_TD * upstream_TD).sum().backward()
    (expected_TD * upstream_TD).sum().backward()
    torch.testing.assert_close(x_TD.grad.double(), wide_TD.grad, **near)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, **near, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("made_up_entries")
def test_entries_say_what_is_random() -> None:
    for name, entry in (DROP_POLICIES | NOISES).items():
        assert entry.is_random == (name in ("random", "jitter", "gumbel", "contrary"))
    for options in ({"noise": "contrary"}, {"drop_policy": "random"}, {"noise": "jitter"}):
        assert layer_of("swiglu", **options)._is_random
    for options in ({}, {"drop_policy": "last"}, {"drop_policy": "position"}):
        assert not layer_of("swiglu", **options)._is_random


@pytest.mark.usefixtures("made_up_entries")
def test_names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(
        "tanh_glu", score="softplus", noise="contrary", num_groups=2, group_score="min", drop_policy="last"
    )
    x_TD = torch.randn(T, D)
    expected_TD = layer(x_TD)[0]
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for registry, name in (
        (SCORES, "softplus"),
        (GROUP_SCORES, "min"),
        (NOISES, "contrary"),
        (DROP_POLICIES, "last"),
        (ACTIVATIONS, "tanh_glu"),
    ):
        monkeypatch.delitem(registry, name)
    for each in (layer, *copies):
        assert torch.equal(each(x_TD)[0], expected_TD)


@pytest.mark.parametrize("name", ["score", "group_score", "noise"])
def test_a_router_refuses_a_name_that_is_in_no_registry(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be one of .*, .*, not 'best'"):
        Router(D, E, K, options(**{name: "best"}))


def test_an_entry_has_the_name_and_the_shape_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "gelu", ACTIVATIONS["relu2"])
    with pytest.raises(ValueError, match="the entry of 'gelu' is called 'relu2'"):
        find_activation("gelu")
    monkeypatch.setitem(schema.ACTIVATION_SHAPES, "swiglu", schema.ActivationShape(gated=False))
    with pytest.raises(ValueError, match=r"ACTIVATION_SHAPES\['swiglu'\] is not ActivationShape\(gated=True"):
        find_activation("swiglu")


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of swiglu, geglu, .*, not 'silu'"):
        find_activation("silu")
