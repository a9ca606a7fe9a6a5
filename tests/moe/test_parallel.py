"""The layer on N ranks is the layer on one: outputs, gradients, counts, and the bytes that travel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

import dsmoe
from dsmoe.moe.dispatch import LocalDispatch, PaddedDispatch, VariableDispatch
from dsmoe.parallel import Groups
from dsmoe.parallel.shape_check import DisagreementError
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D, E = 16, 4


@dataclass(frozen=True)
class Case:
    """`tokens` of each rank; experts in `starved` are chosen by nobody; every third token of `masked` is padding."""

    name: str
    tokens: tuple[int, ...]
    factor: float | None = None
    pad: bool = True
    top_k: int = 2
    drop_policy: str = "probability"
    aux_loss: float = 0.0
    starved: tuple[int, ...] = ()
    masked: bool = False
    users: bool = False
    experts: int = E
    more: dict[str, Any] = field(default_factory=dict)

    def layer(self, ep_size: int, expert_tensor: int = 1) -> dsmoe.MoE:
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D)) if self.users else None
        layer = moe_layer(
            D,
            expert,
            self.experts,
            ep_size,
            self.top_k,
            capacity_factor=self.factor,
            min_capacity=1,
            expert_ffn_size=None if self.users else 16,
            expert_tensor=expert_tensor,
            pad=self.pad,
            drop_policy=self.drop_policy,
            aux_loss=self.aux_loss,
            z_loss=self.aux_loss,
            seed=7,
            **self.more,
        )
        layer.reset_experts(0.3, 0.3)
        nn.init.normal_(layer.router.weight)
        with torch.no_grad():
            layer.router.weight[:, 0] = 0.0
            layer.router.weight[list(self.starved), 0] = -9.0
        return layer

    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Tokens, mask and cotangent of every rank."""
        torch.manual_seed(1)
        each = []
        for count in self.tokens:
            x = torch.randn(count, D)
            x[:, 0] = 2.0
            used = torch.arange(count) % 3 != 1 if self.masked else None
            each.append((x.requires_grad_(), used, torch.randn(count, D)))
        return each


def cases(ranks: int) -> list[Case]:
    """Every dispatch, with the tokens for `ranks` ranks."""
    equal, unequal = (12,) * ranks, tuple(range(9, 9 - ranks, -1))
    return [
        Case("dropless", equal),
        Case("dropless, one choice", equal, top_k=1),
        Case("dropless, every expert", equal, top_k=4),
        Case("dropless, unequal token counts", unequal),
        Case("dropless, the last rank without tokens", (*unequal[:-1], 0)),
        Case("dropless, the last rank without rows", equal, starved=(E - 1, E - 2), aux_loss=0.1),
        Case("dropless, masked", unequal, masked=True, aux_loss=0.1),
        Case("padded, nothing dropped", equal, factor=4.0),
        Case("padded", equal, factor=0.5, aux_loss=0.1),
        Case("padded, by position", equal, factor=0.5, drop_policy="position"),
        Case("padded, masked", equal, factor=0.5, masked=True),
        Case("padded, the last rank without rows", equal, factor=1.0, starved=(E - 1, E - 2)),
        Case("padded, no tokens anywhere", (0,) * ranks, factor=1.0),
        Case("padded, unequal token counts", unequal, factor=0.5, masked=True, aux_loss=0.1),
        Case("padded, unequal token counts of a known largest", unequal, factor=0.5, more={"max_tokens": 9}),
        Case("padded, the last rank without tokens", (*unequal[:-1], 0), factor=0.5),
        Case("only what is kept", equal, factor=0.5, pad=False, aux_loss=0.1),
        Case("only what is kept, unequal token counts", unequal, factor=0.5, pad=False, masked=True),
        Case("only what is kept, by position", unequal, factor=0.5, pad=False, drop_policy="position"),
        Case("padded, renormalised", equal, factor=0.5, more={"renormalize_dropped": True, "score": "sigmoid"}),
        Case("only what is kept, renormalised", unequal, factor=0.5, pad=False, more={"renormalize_dropped": True}),
        Case("dropless, the best of two groups", unequal, more={"num_groups": 2, "score": "sigmoid"}),
        Case("experts choose, padded", unequal, factor=1.0, more={"choice": "expert"}),
        Case(
            "experts choose, only what is kept", unequal, factor=2.0, masked=True, pad=False, more={"choice": "expert"}
        ),
        Case("dropless, in turn", unequal, masked=True, more={"force_balanced": True}),
        Case("shared expert, dropless", unequal, masked=True, more={"shared_expert_ffn_size": 24}),
        Case("shared expert, one rank without tokens", (*unequal[:-1], 0), more={"shared_expert_ffn_size": 24}),
        Case("shared expert, padded", equal, factor=0.5, aux_loss=0.1, more={"shared_expert_ffn_size": 24}),
        Case("shared expert, only what is kept", unequal, factor=0.5, pad=False, more={"shared_expert_ffn_size": 24}),
        Case("residual, dropless", unequal, aux_loss=0.1, more={"use_residual": True, "activation": "relu2"}),
        Case("residual, padded", equal, factor=0.5, masked=True, more={"use_residual": True}),
        Case("user's module, residual", unequal, users=True, more={"use_residual": True}),
        Case("user's module, dropless", unequal, users=True),
        Case("user's module, padded", equal, factor=0.5, users=True),
        Case("user's module, the last rank without rows", equal, starved=(E - 1, E - 2), users=True),
    ]


def expert_gradients(layer: dsmoe.MoE) -> dict[str, torch.Tensor]:
    """[L, ...] per kind of parameter, zeros where there is none."""
    if not layer.experts.__class__.__name__.startswith("Module"):
        return {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
    each = [dict(expert.named_parameters()) for expert in layer.experts.deepspeed_experts]
    return {name: torch.stack([parameters[name].grad for parameters in each]) for name in each[0]}


def check_case(case: Case, layer: dsmoe.MoE, groups: Groups) -> None:
    """Compare this rank's part of `layer` with the whole layer applied to the tokens of each rank in turn."""
    whole = case.layer(ep_size=1)
    expected = []
    for x, used, cotangent in case.inputs():
        output, aux_loss, counts = whole(x, used)
        (output * cotangent).sum().backward()
        expected.append((output, aux_loss, counts, x.grad))

    x, used, cotangent = case.inputs()[dist.get_rank()]
    output, aux_loss, counts = layer(x, used)
    (output * cotangent).sum().backward()

    def same(what: str, actual: torch.Tensor, wanted: torch.Tensor) -> None:
        # Sums over the ranks' tokens in another order: a few units of 1.2e-7 of what cancels, which is as large as the
        # largest that does not.
        atol = max(4e-6, 1e-6 * float(wanted.abs().max())) if wanted.numel() else 0.0
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=atol, msg=lambda m: f"{case.name}: {what}: {m}")

    mine = expected[dist.get_rank()]
    for what, actual, wanted in zip(("output", "loss", "counts", "x.grad"), (output, aux_loss, counts, x.grad), mine):  # noqa: B905
        same(what, actual, wanted)
    for name, parameter in layer.named_parameters():
        if not hasattr(parameter, "group_name"):  # the router, and what every token passes
            dist.all_reduce(parameter.grad)
            same(f"{name}.grad", parameter.grad, whole.get_parameter(name).grad)
    dist.all_reduce(layer.statistics.sums)
    same("statistics", layer.statistics.sums, whole.statistics.sums)
    first = groups.coordinate("expert") * layer.num_local_experts
    for (name, actual), wanted in zip(expert_gradients(layer).items(), expert_gradients(whole).values(), strict=True):
        dist.all_reduce(actual, group=groups.handle("expert_data"))
        mine_L = wanted[first : first + layer.num_local_experts]
        if layer.layout.expert_tensor > 1:
            gate_up, down = layer.experts.shards(groups.coordinate("expert_tensor"))
            mine_L = torch.stack([(down if name == "down" else gate_up).slice_of(expert) for expert in mine_L])
        same(f"{name}.grad", actual, mine_L)

    if case.factor is None and not case.aux_loss and not case.masked:
        together, _, _ = whole(torch.cat([x for x, _, _ in case.inputs()]))
        same("all tokens at once", output, together.split(case.tokens)[dist.get_rank()])


def check_all_cases(expert: int, expert_tensor: int) -> set[str]:
    """The dispatches that were used."""
    groups = Groups(Topology(1, dist.get_world_size(), expert=expert, expert_tensor=expert_tensor))
    kinds = set()
    for case in cases(dist.get_world_size()):
        if case.users and expert_tensor > 1:
            continue  # a module of the user's is never cut
        layer = case.layer(expert, expert_tensor)
        layer.set_expert_group(groups.expert_group())
        check_case(case, layer, groups)
        kinds.add(type(layer._exchange(case.factor)).__name__)
    return kinds


@pytest.mark.parametrize(
    ("ranks", "expert", "expert_tensor"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 4, 1), (2, 1, 2), (4, 2, 2)]
)
def test_every_dispatch_equals_one_rank(ranks: int, expert: int, expert_tensor: int) -> None:
    exchanges = {LocalDispatch} if expert * expert_tensor == 1 else {PaddedDispatch, VariableDispatch}
    assert run_ranks(ranks, check_all_cases, expert, expert_tensor) == [{kind.__name__ for kind in exchanges}] * ranks


def check_deepspeeds_groups(data_first: bool) -> list[int]:
    """The layer over groups that DeepSpeed makes, as its engine asks for; returns the expert group's ranks."""
    case = Case("DeepSpeed's groups", (5, 6, 7, 8))
    layer = case.layer(ep_size=2)
    layer.set_deepspeed_parallelism(use_data_before_expert_parallel_=data_first)
    if data_first:  # the layer drew its experts anew, with the default spread
        layer.reset_experts(0.3, 0.3)
    whole = case.layer(ep_size=1)
    x, _, _ = case.inputs()[dist.get_rank()]
    torch.testing.assert_close(layer(x)[0], whole(x)[0])
    return dist.get_process_group_ranks(deepspeed_groups._get_expert_parallel_group("ep_size_2"))


@pytest.mark.parametrize(
    ("data_first", "expected"), [(False, [[0, 1], [0, 1], [2, 3], [2, 3]]), (True, [[0, 2], [1, 3], [0, 2], [1, 3]])]
)
def test_groups_that_deepspeed_makes_serve_as_well(data_first: bool, expected: list[list[int]]) -> None:
    assert run_ranks(4, check_deepspeeds_groups, data_first) == expected


def exceed_max_tokens() -> str:
    layer = Case("", (9, 9), factor=1.0, more={"max_tokens": 8}).layer(2)
    layer.set_expert_group(Groups(Topology(1, 2, expert=2)).expert_group())
    layer(torch.randn(8, D))
    with pytest.raises(ValueError, match="tokens came to this MoE layer") as caught:
        layer(torch.randn(9, D))
    return str(caught.value)


def test_more_tokens_than_the_stated_largest_number_are_refused() -> None:
    for message in run_ranks(2, exceed_max_tokens):
        assert message.startswith("9 tokens came to this MoE layer, whose max_tokens has room for 4 rows per expert")
        assert message.endswith("and not for 5; raise max_tokens")


def exchange_differently(what: str) -> str:
    layer = Case("", (9, 9), factor=1.0).layer(2)
    layer.pad = what == "padding" and dist.get_rank() == 1
    if what == "choices" and dist.get_rank() == 1:
        layer.router.k = 1
    layer.set_expert_group(Groups(Topology(1, 2, expert=2)).expert_group("blocks.3.ffn"))
    with pytest.raises(DisagreementError) as caught:
        layer(torch.randn(8, D))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "odd"),
    [("padding", "top 2, padded, as the fullest rank needs (8 tokens)"), ("choices", "top 1, not padded (8 tokens)")],
)
def test_ranks_that_would_exchange_differently_all_stop_with_the_reason(what: str, odd: str) -> None:
    first, second = run_ranks(2, exchange_differently, what)
    assert first == second
    assert "rank 0: layer blocks.3.ffn, exchange of rows of" in first
    assert "top 2, not padded (8 tokens)" in first
    assert odd in first


# SENT[r][p] tokens of rank r choose the expert of rank p. Ranks 0 and 1 are one node, 2 and 3 the other.
SENT = [[2, 1, 0, 3], [1, 1, 2, 0], [0, 4, 0, 1], [2, 0, 0, 3]]


def measure_traffic(factor: float | None, pad: bool) -> dict[str, Any]:
    """Bytes over (intra, inter) after the forward pass, and those that the backward pass adds."""
    groups = Groups(Topology(nodes=2, devices_per_node=2, expert=4))
    layer = moe_layer(
        D, num_experts=4, ep_size=4, capacity_factor=factor, min_capacity=1, pad=pad, expert_ffn_size=8, seed=0
    )
    layer.set_expert_group(groups.expert_group())
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, D))
    choices = torch.arange(4).repeat_interleave(torch.tensor(SENT[dist.get_rank()]))
    if pad:
        choices = torch.arange(8) % 4
    output, _, counts = layer(nn.functional.one_hot(choices, D).float().requires_grad_())
    forward = layer.take_traffic()
    output.sum().backward()
    return {
        "counts": counts.tolist(),
        "forward": forward,
        "backward": layer.take_traffic(),
        "then": layer.take_traffic(),
    }


def test_variable_exchange_sends_what_was_chosen() -> None:
    """A row goes out with its fp32 weight and its result comes back; in the backward pass the gradients of all three.

    What goes out is `SENT[rank][peer]` rows, what comes back here goes out there: `SENT[peer][rank]`.
    """
    row_bytes, weight_bytes = D * 4, 4
    for rank, measured in enumerate(run_ranks(4, measure_traffic, None, False)):
        assert measured["counts"] == SENT[rank]
        node = rank // 2
        near = [peer for peer in (2 * node, 2 * node + 1) if peer != rank]
        far = [2 - 2 * node, 3 - 2 * node]
        for peers, link in ((near, 0), (far, 1)):
            out, back = (sum(pairs) for pairs in zip(*((SENT[rank][p], SENT[p][rank]) for p in peers), strict=True))
            assert measured["forward"][link] == (out + back) * row_bytes + out * weight_bytes
            assert measured["backward"][link] == (out + back) * row_bytes + back * weight_bytes
        assert measured["then"] == (0, 0)


def test_padded_exchange_sends_full_buffers() -> None:
    """8 tokens over 4 experts at factor 1.5: 3 rows and weights to each of one near and two far ranks, 3 rows back."""
    to_one = 2 * 3 * D * 4 + 3 * 4
    for measured in run_ranks(4, measure_traffic, 1.5, True):
        assert measured["forward"] == measured["backward"] == (to_one, 2 * to_one)
