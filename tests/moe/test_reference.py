"""`dsmoe.MoE` on one rank is the reference loop: outputs, gradients, losses and counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import dsmoe
from dsmoe.moe import read_statistics
from dsmoe.moe.capacity import DROPS
from dsmoe.moe.replay import uniform
from dsmoe.moe.scores import SCORES
from tests.helpers.layer_options import moe_layer
from tests.helpers.moe_reference import Expected, Settings, capacity_of, run_reference, swiglu_expert

D, I = 8, 8  # noqa: E741
FP32_RESOLUTION = 1e-5
GROUPED = [(n, (g, best, how)) for n, g, best in [(4, 2, 1), (6, 3, 2), (8, 4, 2)] for how in ("max", "top2_sum")]


class CloseCallError(Exception):
    """The case turns on a difference that fp32 cannot see."""


@dataclass(frozen=True)
class Case:
    """The layer's settings.

    `biased` gives it a selection bias and, under scope `global`, some load share; `dense` is what every token passes:
    `none`, `shared` or `residual`.
    """

    num_experts: int
    top_k: int
    factor: float | None = None
    minimum: int = 1
    drop_policy: str = "probability"
    normalize: bool = True
    aux_loss: float = 0.0
    z_loss: float = 0.0
    score: str = "softmax"
    scale: float = 1.0
    groups: tuple[int, int, str] = (1, 1, "top2_sum")
    biased: bool = False
    force_balanced: bool = False
    renormalize_dropped: bool = False
    scope: str = "micro_batch"
    sequences: int = 1
    choice: str = "token"
    dense: str = "none"

    def layer(self) -> dsmoe.MoE:
        num_groups, top_k_groups, group_score = self.groups
        layer = moe_layer(
            D,
            num_experts=self.num_experts,
            k=self.top_k,
            capacity_factor=self.factor,
            choice=self.choice,
            min_capacity=self.minimum,
            use_residual=self.dense == "residual",
            expert_ffn_size=I,
            shared_expert_ffn_size=12 if self.dense == "shared" else None,
            normalize_weights=self.normalize,
            drop_policy=self.drop_policy,
            aux_loss=self.aux_loss,
            z_loss=self.z_loss,
            score=self.score,
            scale=self.scale,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            group_score=group_score,
            force_balanced=self.force_balanced,
            renormalize_dropped=self.renormalize_dropped,
            scope=self.scope,
            bias_update_rate=0.001 if self.biased else 0.0,
            seed=3,
        )
        with torch.no_grad():  # large enough for clear decisions and visible gradients
            layer.router.weight.normal_()
            layer.experts.gate_up.normal_(std=0.5)
            layer.experts.down.normal_(std=0.5)
            for name, parameter in layer.named_parameters():
                if name.startswith(("shared", "mlp", "coefficient")):
                    parameter.normal_(std=0.5)
            if layer.balance.bias is not None:
                layer.balance.bias.copy_((torch.randn(self.num_experts) * 2).round() / 8)
            if layer.balance.load_share is not None:
                layer.balance.load_share.copy_(torch.rand(self.num_experts).softmax(0))
        return layer

    def settings(self, layer: dsmoe.MoE, num_tokens: int) -> Settings:
        drawn = None
        if self.drop_policy == "random":  # what the next pass will draw
            key = layer._draws.key(layer._draw.seed, torch.tensor(layer._draws.count))
            drawn = uniform(key + DROPS, (num_tokens * self.top_k,), key.device).tolist()
        num_groups, top_k_groups, group_score = self.groups
        bias, load_share = layer.balance.bias, layer.balance.load_share
        return Settings(
            self.top_k,
            capacity_of(num_tokens, self.top_k, self.num_experts, self.factor, self.minimum),
            "position" if self.choice == "expert" else self.drop_policy,
            self.score,
            self.normalize,
            self.scale,
            num_groups,
            top_k_groups,
            group_score,
            None if bias is None else bias.tolist(),
            self.force_balanced,
            self.renormalize_dropped and self.factor is not None,
            drawn,
            self.sequences if self.scope == "sequence" else 1,
            None if load_share is None else load_share.tolist(),
            self.choice,
        )


def assert_equals_reference(
    case: Case, layer: dsmoe.MoE, x: torch.Tensor, used: torch.Tensor | None = None, loss_scale: float = 1.0
) -> Expected:
    """Run both forward and backward on [T, D] `x`, compare everything, and return what the reference says."""
    layer.loss_scale = loss_scale
    x = x.detach().requires_grad_()
    actual = {"x": x, **{name.removeprefix("deepspeed_moe."): value for name, value in layer.named_parameters()}}
    exact = {name: value.detach().double().requires_grad_() for name, value in actual.items()}
    dense = {"none": None, "shared": "shared", "residual": "mlp"}[case.dense]
    expected = run_reference(
        exact["x"],
        exact["gate.wg.weight"],
        list(map(swiglu_expert, exact["experts.gate_up"], exact["experts.down"])),
        case.settings(layer, len(x)),
        None if used is None else used.tolist(),
        swiglu_expert(exact[f"{dense}.gate_up.weight"], exact[f"{dense}.down.weight"]) if dense else None,
        (exact["coefficient.weight"], exact["coefficient.bias"]) if case.dense == "residual" else None,
    )
    if expected.closest_call < FP32_RESOLUTION:
        raise CloseCallError
    output, aux_loss, counts = layer(x.view(case.sequences, -1, D), used)
    output = output.view_as(x)
    cotangent = torch.randn_like(output)
    (output * cotangent).sum().backward()
    losses = loss_scale * (case.aux_loss * expected.aux_loss + case.z_loss * expected.z_loss)
    ((expected.output * cotangent).sum() + losses).backward()

    torch.testing.assert_close(output, expected.output.float(), rtol=1e-4, atol=1e-5)
    for name, value in actual.items():
        grad = exact[name].grad
        wanted = torch.zeros_like(value) if grad is None else grad.float()
        torch.testing.assert_close(value.grad, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}.grad: {m}")
    assert counts.tolist() == expected.assigned
    assert aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    counted = read_statistics(layer.statistics.sums, case.num_experts)
    assert counted.assigned_E.tolist() == expected.assigned
    assert counted.kept_E.tolist() == expected.kept
    assert counted.z_loss == pytest.approx(expected.z_loss.item(), rel=1e-5, abs=1e-6)
    assert counted.weight == pytest.approx(expected.weight, rel=1e-5)
    assert counted.dropped_weight == pytest.approx(expected.dropped_weight, rel=1e-5, abs=1e-6)
    assert counted.square_logit == pytest.approx(expected.square_logit, rel=1e-5)
    return expected


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("drop_policy", ["probability", "position", "random"])
@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
class TestEverySetting:
    def test_plain(self, top_k: int, drop_policy: str, factor: float | None, normalize: bool) -> None:
        case = Case(6, top_k, factor, 1, drop_policy, normalize)
        expected = assert_equals_reference(case, case.layer(), torch.randn(12, D))
        assert (expected.kept != expected.assigned) == (factor in (0.5, 1.0)), "the case is to show drops, or none"

    def test_masked_tokens(self, top_k: int, drop_policy: str, factor: float | None, normalize: bool) -> None:
        case = Case(6, top_k, factor, 1, drop_policy, normalize)
        used = torch.arange(12) % 3 != 1
        expected = assert_equals_reference(case, case.layer(), torch.randn(12, D), used)
        assert sum(expected.assigned) == 8 * top_k
        assert not expected.output[~used].any()

    def test_experts_that_nobody_chooses(
        self, top_k: int, drop_policy: str, factor: float | None, normalize: bool
    ) -> None:
        case = Case(6, top_k, factor, 1, drop_policy, normalize)
        layer, x, starved = case.layer(), torch.randn(12, D), [0, 4]
        x[:, 0] = 4.0
        with torch.no_grad():
            layer.router.weight[:, 0] = 0.0
            layer.router.weight[starved, 0] = -4.0
        expected = assert_equals_reference(case, layer, x)
        assert [expected.assigned[e] for e in starved] == [0, 0]
        assert not layer.experts.gate_up.grad[starved].any()
        assert not layer.experts.down.grad[starved].any()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_one_token(top_k: int, factor: float | None) -> None:
    case = Case(3, top_k, factor, normalize=top_k > 1)
    assert_equals_reference(case, case.layer(), torch.randn(1, D))


@pytest.mark.parametrize("drop_policy", ["probability", "position"])
def test_among_equals_the_first_stay(drop_policy: str) -> None:
    case = Case(4, 2, 0.5, 1, drop_policy)
    x = torch.randn(1, D).repeat(12, 1)
    expected = assert_equals_reference(case, case.layer(), x)
    assert sorted(expected.kept) == [0, 0, 3, 3]
    assert expected.output[:3].any(dim=1).all()
    assert not expected.output[3:].any()


def test_the_heavier_stay_though_they_come_last() -> None:
    """The two policies differ: tokens of growing router weight, of which an expert takes half."""
    direction = torch.randn(D)
    x = direction * torch.linspace(0.2, 1.5, 8)[:, None]
    kept = {}
    for drop_policy in ("probability", "position"):
        case = Case(2, 1, 1.0, 1, drop_policy, normalize=False)
        kept[drop_policy] = assert_equals_reference(case, case.layer(), x).output.any(dim=1).tolist()
    assert kept["position"] == [True] * 4 + [False] * 4
    assert kept["probability"] == [False] * 4 + [True] * 4


def test_the_smallest_capacity_is_honoured() -> None:
    case = Case(6, 1, factor=0.5, minimum=3, normalize=False)
    expected = assert_equals_reference(case, case.layer(), torch.randn(12, D))
    assert max(expected.kept) == 3
    assert max(expected.assigned) > 3


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize(("aux_loss", "z_loss"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("loss_scale", [1.0, 0.25])
def test_attached_losses_flow_as_if_they_were_added(
    factor: float | None, aux_loss: float, z_loss: float, loss_scale: float
) -> None:
    case = Case(4, 2, factor, aux_loss=aux_loss, z_loss=z_loss)
    used = torch.arange(10) != 7
    assert_equals_reference(case, case.layer(), torch.randn(10, D), used, loss_scale)


@pytest.mark.parametrize("aux_loss", [0.0, 0.3])
def test_the_returned_loss_is_the_callers_to_add_only_where_it_does_not_flow_by_itself(aux_loss: float) -> None:
    layer = Case(4, 2, aux_loss=aux_loss).layer()
    _, returned, _ = layer(torch.randn(10, D))
    assert returned.requires_grad == (aux_loss == 0)


def test_evaluation_attaches_no_loss() -> None:
    layer = Case(4, 2, aux_loss=0.3, z_loss=0.2).layer().eval()
    output, _, _ = layer(torch.randn(10, D))
    (0.0 * output).sum().backward()
    assert not layer.router.weight.grad.any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "groups", [(1, 1, "top2_sum"), (4, 2, "top2_sum"), (4, 2, "max"), (2, 1, "top2_sum"), (8, 3, "max")]
)
@pytest.mark.parametrize("biased", [False, True])
def test_scores_groups_and_bias(score: str, normalize: bool, groups: tuple[int, int, str], biased: bool) -> None:
    settings = {"score": score, "groups": groups, "biased": biased, "scale": 2.5}
    case = Case(8, 3, 1.0, normalize=normalize, aux_loss=0.3, z_loss=0.1, **settings)
    assert_equals_reference(case, case.layer(), torch.randn(12, D), torch.arange(12) != 7)


class TestExpertsChoose:
    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 9.0])
    @pytest.mark.parametrize("masked", [0, 3, 11, 12])
    def test_every_setting(self, score: str, factor: float, masked: int) -> None:
        """Up to every expert taking every token; and fewer tokens than an expert has room for."""
        case = Case(
            6,
            2,
            factor,
            normalize=False,
            score=score,
            scale=1.5,
            aux_loss=0.2,
            z_loss=0.1,
            sequences=2,
            choice="expert",
        )
        expected = assert_equals_reference(case, case.layer(), torch.randn(12, D), torch.arange(12) >= masked)
        assert expected.kept == [min(case.settings(case.layer(), 12).capacity, 12 - masked)] * 6

    def test_among_equals_the_first_are_taken(self) -> None:
        case = Case(3, 1, 1.0, normalize=False, choice="expert")
        expected = assert_equals_reference(case, case.layer(), torch.randn(1, D).repeat(9, 1))
        assert expected.output.any(dim=1).tolist() == [True] * 3 + [False] * 6

    def test_a_token_sees_what_comes_after_it(self) -> None:
        """Why no causal model may use it: a last token that suits expert 0 better takes an earlier one's place."""
        case = Case(3, 1, 1.0, normalize=False, choice="expert")
        layer, x = case.layer(), torch.randn(9, D)
        outputs = [layer(torch.cat([x[:-1], sign * layer.router.weight[:1].detach()]))[0][:-1] for sign in (-9.0, 9.0)]
        assert not torch.equal(*outputs)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
@pytest.mark.parametrize("masked", ["nothing", "some", "one sequence", "everything"])
def test_scopes_of_the_balancing_loss(scope: str, masked: str) -> None:
    used = {
        "nothing": None,
        "some": torch.arange(15) % 4 != 1,
        "one sequence": torch.arange(15) // 5 != 1,
        "everything": torch.zeros(15),
    }[masked]
    case = Case(5, 2, aux_loss=0.3, scope=scope, sequences=3, score="sigmoid")
    expected = assert_equals_reference(case, case.layer(), torch.randn(15, D), used)
    assert (expected.aux_loss == 0) == (masked == "everything")


def test_the_balancing_loss_of_a_sequence_is_that_of_the_layer_on_it_alone() -> None:
    x = torch.randn(3, 7, D)
    layer = Case(4, 2, scope="sequence").layer()
    together = layer(x)[1]
    alone = [layer(sequence)[1] for sequence in x]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert not torch.isclose(together, Case(4, 2).layer()(x)[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("drop_policy", ["probability", "position", "random"])
def test_the_kept_choices_can_take_the_weight_of_the_dropped_ones(normalize: bool, drop_policy: str) -> None:
    case = Case(4, 3, 0.6, 1, drop_policy, normalize, scale=1.5, renormalize_dropped=True)
    layer, x = case.layer(), torch.randn(12, D)
    used = torch.arange(12) != 3
    expected = assert_equals_reference(case, layer, x, used)
    assert expected.dropped_weight > 0
    routing = layer.router(x, used)
    counts = torch.tensor(expected.assigned)
    assignments = layer.limit(routing, counts, torch.tensor(1))
    weights = layer.limit.weights(routing, assignments)
    has_some = weights.any(dim=1)
    torch.testing.assert_close(weights.sum(1)[has_some], routing.weights_TK.sum(1)[has_some])


@pytest.mark.parametrize("dense", ["shared", "residual"])
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_what_every_token_passes(dense: str, factor: float | None, masked: bool) -> None:
    case = Case(4, 2, factor, aux_loss=0.3, z_loss=0.1, dense=dense)
    used = torch.arange(12) % 3 != 1
    expected = assert_equals_reference(case, case.layer(), torch.randn(12, D), used if masked else None)
    assert expected.output.any(dim=1).tolist() == (used.tolist() if masked else [True] * 12), "dropped ones pass too"


@given(
    num_tokens=st.integers(1, 9),
    experts=st.sampled_from([(n, (1, 1, "top2_sum")) for n in range(1, 6)] * 2 + GROUPED),
    top_k=st.integers(1, 4),
    factor=st.sampled_from([None, 0.25, 0.5, 1.0, 1.25, 4.0]),
    minimum=st.integers(1, 4),
    drop_policy=st.sampled_from(["probability", "position", "random"]),
    normalize=st.booleans(),
    score=st.sampled_from(list(SCORES)),
    scale=st.sampled_from([1.0, 2.5]),
    flags=st.tuples(st.booleans(), st.booleans(), st.integers(0, 4).map(lambda n: n == 0)),
    scope=st.sampled_from(["micro_batch", "sequence", "global"]),
    copies=st.booleans(),
    used=st.none() | st.lists(st.booleans(), min_size=9, max_size=9),
    losses=st.sampled_from([(0.0, 0.0), (0.5, 0.25)]),
    choice=st.sampled_from(["token", "expert"]),
    dense=st.sampled_from(["none", "shared", "residual"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_any_small_case(
    num_tokens: int,
    experts: tuple[int, tuple[int, int, str]],
    top_k: int,
    factor: float | None,
    minimum: int,
    drop_policy: str,
    normalize: bool,
    score: str,
    scale: float,
    flags: tuple[bool, bool, bool],
    scope: str,
    copies: bool,
    used: list[bool] | None,
    losses: tuple[float, float],
    choice: str,
    dense: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_experts, groups = experts
    top_k = min(top_k, num_experts // groups[0] * groups[1])
    biased, renormalize, balanced = flags
    normalize = normalize and top_k > 1
    options = {"score": score, "scale": scale, "groups": groups, "scope": scope, "biased": biased, "dense": dense}
    options |= {"renormalize_dropped": renormalize, "force_balanced": balanced}
    if factor is not None and not (biased or renormalize or balanced or groups[0] > 1):
        options["choice"] = choice
        normalize = normalize and choice == "token"
    options["sequences"] = 3 if num_tokens % 3 == 0 else 1
    case = Case(num_experts, top_k, factor, minimum, drop_policy, normalize, *losses, **options)
    layer = case.layer()
    x = torch.randn(num_tokens, D)
    if copies:
        x = x[torch.randint(num_tokens, (num_tokens,))]
    # Eighths: their products add up exactly in fp32, so that copies of a token tie exactly.
    x = (x * 8).round() / 8
    with torch.no_grad():
        layer.router.weight.copy_((layer.router.weight * 8).round() / 8)
    try:
        assert_equals_reference(case, layer, x, None if used is None else torch.tensor(used[:num_tokens]))
    except CloseCallError:
        reject()
