"""The decoder: loss, causality, attention, initial weights, and what the planner says of its size and cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.config.load import load_config
from dsmoe.config.schema import Config, Model
from dsmoe.model import Transformer, build_model
from dsmoe.nn import loss as loss_module
from dsmoe.nn.attention import Attention, Rotary, rotate
from dsmoe.parallel import ExpertGroup, Groups, TensorGroup
from dsmoe.plan import Topology, count_parameters, flops_per_token
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.plan_configs import make_config

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "dense_layers": 1,
    "init_std": 0.2,
}
MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24, "balance": {"aux_loss": 0.0}}
SWITCH = {**MOE, "num_experts": 8, "top_k": 1, "router": {"normalize_weights": False}}

WITH_DENSE = [
    {**MOE, **more, "activation": activation}
    for more in ({"shared_expert_ffn_size": 40}, {"residual": True})
    for activation in ("swiglu", "relu2")
]


def small_config(moe: dict[str, Any] | None = MOE, train: dict[str, Any] | None = None, **model: Any) -> Config:
    """One dense and two MoE layers; dropless."""
    return make_config(model={**SMALL, **model}, moe=moe, train=train or {})


def random_tokens(length: int, sequences: int = 2) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(SMALL["vocab_size"], (sequences, length))


class LargestResult(TorchDispatchMode):
    """Remembers the largest floating-point tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


class TestLoss:
    def test_is_the_cross_entropy_of_the_next_token(self) -> None:
        model, tokens = build_model(small_config()), random_tokens(9)
        losses = model(tokens)
        assert losses.shape == (2, 8)
        logits = model.logits(tokens[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 8)
        torch.testing.assert_close(losses, expected)

    @pytest.mark.parametrize("tokens_per_chunk", [1, 3, 10, 1000])
    def test_chunks_change_neither_value_nor_gradient(
        self, tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        hidden, head, weights = torch.randn(10, 8), torch.randn(7, 8), torch.rand(10)
        targets = torch.randint(7, (10,))
        pairs = []
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", tokens_per_chunk * 7)
        monkeypatch.setattr(loss_module, "LOGITS_PER_BLOCK_ON_CPU", 2 * 7)
        for function in (loss_module.token_losses, lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="none")):
            leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            losses = function(*leaves, targets)
            (losses * weights).sum().backward()
            pairs.append((losses, *(leaf.grad for leaf in leaves)))
        for actual, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(actual, expected)

    def test_no_more_logits_than_a_chunk_are_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing that is computed is larger. Kept are the inputs, a number per token and one chunk."""
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 4 * 70)
        hidden, head = torch.randn(40, 2, requires_grad=True), torch.randn(70, 2, requires_grad=True)
        targets, kept = torch.zeros(40, dtype=torch.int64), []
        with (
            LargestResult() as largest,
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        ):
            loss_module.token_losses(hidden, head, targets).sum().backward()
        assert largest.numel == 4 * 70
        inputs = {x.data_ptr() for x in (hidden, head, targets)}
        assert [x.shape for x in kept if x.data_ptr() not in inputs] == [(40,)]

    def test_the_logits_of_the_forward_pass_are_used_once(self) -> None:
        """Their gradient overwrites them: a second backward pass makes them anew."""
        hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        losses = loss_module.token_losses(hidden, head, torch.randint(7, (5,)))
        gradients, products = [], []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                gradients.append(torch.autograd.grad(losses.sum(), (hidden, head), retain_graph=True))
            products.append(counter.get_total_flops() / (2 * 5 * 4 * 7))
        assert products == [2, 3]
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second)

    def test_gradient_is_that_of_the_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 3 * 7)
        torch.manual_seed(0)
        hidden, head = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
        targets = torch.randint(7, (5,))
        assert loss_module.token_losses(hidden, head, targets).dtype == torch.float64
        assert torch.autograd.gradcheck(lambda h, w: loss_module.token_losses(h, w, targets), (hidden, head))

    def test_without_gradient(self) -> None:
        hidden, head, targets = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.randint(7, (5,))
        with torch.no_grad():
            losses = loss_module.token_losses(hidden, head, targets)
        assert not losses.requires_grad
        torch.testing.assert_close(losses, F.cross_entropy(hidden @ head.detach().T, targets, reduction="none"))

    def test_many_chunks_in_bf16_are_as_exact_as_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The chunks' gradients of the head are added in fp32: 64 roundings to bf16 would leave an error of 0.01."""
        torch.manual_seed(0)
        hidden, head = torch.randn(1024, 64).bfloat16() + 0.5, torch.randn(96, 64).bfloat16() / 8
        targets = torch.randint(96, (1024,))

        def gradient(function: Any, dtype: torch.dtype) -> torch.Tensor:
            leaf = head.to(dtype, copy=True).requires_grad_()
            function(hidden.to(dtype), leaf, targets).mean().backward()
            return leaf.grad.double()

        exact = gradient(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="none"), torch.float64)
        error = {}
        for chunks in (1, 64):
            monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1024 * 96 // chunks)
            error[chunks] = ((gradient(loss_module.token_losses, torch.bfloat16) - exact).norm() / exact.norm()).item()
        assert error[1] < 0.003
        assert error[64] < 1.2 * error[1]

    def test_is_fp32_for_a_bf16_model(self) -> None:
        model, tokens = build_model(small_config()), random_tokens(9)
        exact = model(tokens)
        losses = model.bfloat16()(tokens)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.mean(), exact.mean(), rtol=0.02, atol=0)

    def test_auxiliary_losses_are_not_in_it_but_in_the_gradient(self) -> None:
        gradients, losses = [], []
        for aux_loss in (0.0, 1.0):
            model = build_model(small_config({**MOE, "balance": {"aux_loss": aux_loss}}))
            loss = model(random_tokens(9)).mean()
            loss.backward()
            losses.append(loss.item())
            gradients.append(model.blocks[1].ffn.router.weight.grad)
        assert losses[0] == losses[1]
        assert (gradients[0] - gradients[1]).abs().max() > 1e-4


class TestLayers:
    def test_dense_and_moe_layers_are_where_the_config_says(self) -> None:
        model = build_model(small_config(num_layers=5, moe_every=2))
        assert [index for index, _ in model.moe_layers()] == [2, 4]
        assert build_model(small_config(None)).moe_layers() == []

    @pytest.mark.parametrize("moe", [MOE, None])
    @pytest.mark.parametrize("changed", [0, 4, 7])
    def test_a_token_changes_no_logits_before_it(self, changed: int, moe: dict[str, Any] | None) -> None:
        model, tokens = build_model(small_config(moe)), random_tokens(8)
        before = model.logits(tokens)
        tokens[:, changed] = (tokens[:, changed] + 1) % SMALL["vocab_size"]
        difference = (model.logits(tokens) - before).abs().amax(dim=(0, 2))
        assert difference[:changed].tolist() == pytest.approx([0.0] * changed, abs=1e-5)
        assert (difference[changed:] > 1e-4).all()

    def test_sequences_do_not_see_each_other(self) -> None:
        model, tokens = build_model(small_config()), random_tokens(8, sequences=3)
        torch.testing.assert_close(model.logits(tokens)[1:2], model.logits(tokens[1:2]), rtol=1e-4, atol=1e-5)

    def test_recompute_changes_neither_loss_nor_gradient(self) -> None:
        results = []
        for recompute in ("none", "full"):
            model = build_model(small_config(train={"recompute": recompute}))
            loss = model(random_tokens(9)).mean()
            loss.backward()
            results.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")


class TestAttention:
    def attention(self, **model: Any) -> Attention:
        torch.manual_seed(0)
        return Attention(small_config(**model).model, TensorGroup.alone())

    def test_is_the_textbooks(self) -> None:
        """Softmax of scaled products over earlier positions, one head at a time, without rotation."""
        attention = self.attention(num_kv_heads=4)
        x = torch.randn(1, 6, 32)
        still = torch.ones(6, 1, 8), torch.zeros(6, 1, 8)
        heads = []
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            q, k, v = (x[0] @ p.weight[rows].T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        expected = torch.cat(heads, dim=-1) @ attention.o_proj.weight.T
        torch.testing.assert_close(attention(x, still)[0], expected)

    def test_grouped_queries_equal_repeated_key_and_value_heads(self) -> None:
        grouped, full = self.attention(num_kv_heads=2), self.attention(num_kv_heads=4)
        with torch.no_grad():
            full.q_proj.weight.copy_(grouped.q_proj.weight)
            full.o_proj.weight.copy_(grouped.o_proj.weight)
            for name in ("k_proj", "v_proj"):
                heads = getattr(grouped, name).weight.view(2, 8, 32)
                getattr(full, name).weight.copy_(heads[[0, 0, 1, 1]].reshape(32, 32))
        x, rotary = torch.randn(2, 6, 32), Rotary(8, 10_000.0)(6)
        torch.testing.assert_close(grouped(x, rotary), full(x, rotary))

    def test_positions_count_and_only_relative_to_each_other(self) -> None:
        attention, x = self.attention(), torch.randn(1, 6, 32)
        everywhere = Rotary(8, 10_000.0)(20)
        first, shifted = (tuple(part[start : start + 6] for part in everywhere) for start in (0, 9))
        torch.testing.assert_close(attention(x, shifted), attention(x, first), rtol=1e-4, atol=1e-5)
        swapped = x[:, [1, 0, 2, 3, 4, 5]]
        assert (attention(swapped, first) - attention(x, first))[0, 5].abs().max() > 1e-3

    def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant(self) -> None:
        x, rotary = torch.randn(2, 6, 32), Rotary(8, 10_000.0)(6)
        change = {}
        for qk_norm in (True, False):
            attention = self.attention(qk_norm=qk_norm, norm_eps=1e-12)
            before = attention(x, rotary)
            with torch.no_grad():
                attention.q_proj.weight.mul_(5.0)
                attention.k_proj.weight.mul_(3.0)
            change[qk_norm] = (attention(x, rotary) - before).abs().max().item()
        assert change[True] < 1e-5 < 1e-2 < change[False]

    def test_qk_norm_is_over_each_head(self) -> None:
        attention = self.attention(qk_norm=True)
        assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (8,)
        with torch.no_grad():
            attention.q_norm.weight.zero_()
        x = torch.randn(1, 5, 32)
        mean_of_values = attention.v_proj(x).cumsum(1) / torch.arange(1, 6)[:, None]  # no scores: all alike
        expected = attention.o_proj(mean_of_values.view(1, 5, 2, 8)[:, :, [0, 0, 1, 1]].flatten(2))
        torch.testing.assert_close(attention(x, Rotary(8, 10_000.0)(5)), expected)


class TestRotary:
    def test_scores_depend_on_the_distance_only(self) -> None:
        torch.manual_seed(0)
        q, k = torch.randn(8), torch.randn(8)
        rotary = Rotary(8, 10_000.0)(20)
        turned_q, turned_k = (rotate(vector.expand(1, 20, 1, 8), rotary)[0, :, 0] for vector in (q, k))
        scores = turned_q @ turned_k.T
        for distance in range(-19, 20):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
        assert scores[0].std() > 0.1

    def test_turns_pairs_by_position_times_frequency(self) -> None:
        """Halves are paired, as in Llama: element 0 with 2, element 1 with 3."""
        cosines, sines = Rotary(4, 100.0)(4)
        x = torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 4, 1, 4)
        fast, slow = 3.0, 3.0 * 100.0**-0.5
        expected = [math.cos(fast), -2 * math.sin(slow), math.sin(fast), 2 * math.cos(slow)]
        assert rotate(x, (cosines, sines))[0, 3, 0].tolist() == pytest.approx(expected, rel=1e-5)

    def test_position_zero_is_not_turned_and_lengths_stay(self) -> None:
        x = torch.randn(2, 5, 3, 8)
        turned = rotate(x, Rotary(8, 10_000.0)(5))
        assert torch.equal(turned[:, 0], x[:, 0])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))

    def test_angles_stay_exact_in_a_bf16_model(self) -> None:
        exact = Rotary(8, 10_000.0)(1000)
        for actual, expected in zip(Rotary(8, 10_000.0).bfloat16()(1000), exact, strict=True):
            assert torch.equal(actual, expected)


class TestInitialWeights:
    @pytest.mark.parametrize("moe", [MOE, *WITH_DENSE])
    def test_follow_from_the_seed_alone(self, moe: dict[str, Any]) -> None:
        torch.manual_seed(1)
        first = build_model(small_config(moe)).state_dict()
        torch.manual_seed(2)
        again = build_model(small_config(moe)).state_dict()
        other = build_model(small_config(moe, train={"seed": 5})).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        same = [name for name in first if torch.equal(first[name], other[name])]
        assert same == [name for name in first if "norm" in name or "bias" in name]

    def test_do_not_depend_on_what_was_made_before(self) -> None:
        """Weights are drawn by name: more layers, and other parameters, change none that both models have."""
        small = dict(build_model(small_config()).named_parameters())
        large = dict(
            build_model(small_config({**MOE, "num_experts": 6}, num_layers=3, qk_norm=True)).named_parameters()
        )
        for name, weight in small.items():
            if "gate.wg" in name:
                continue  # [E, D] is drawn whole
            common = large[name][:4] if "experts" in name else large[name]
            assert torch.equal(common, weight), name

    def test_do_not_depend_on_the_layout(self) -> None:
        whole = dict(build_model(small_config()).named_parameters())
        for parts in (run_ranks(2, built_weights, 2), run_ranks(2, built_weights, 1)):
            for name, weight in whole.items():
                if "experts" in name and len(parts[0][name]) < 4:
                    assert torch.equal(torch.cat([part[name] for part in parts]), weight), name
                else:
                    assert all(torch.equal(part[name], weight) for part in parts), name

    @pytest.mark.parametrize("moe", [MOE, *WITH_DENSE])
    def test_have_the_documented_spread(self, moe: dict[str, Any]) -> None:
        model = build_model(small_config(moe, vocab_size=400, hidden_size=64, ffn_size=96, num_layers=8, init_std=0.05))
        residual = 0.05 / math.sqrt(2 * 8)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert (parameter == (0 if "coefficient" in name else 1)).all(), name
                continue
            std = residual if "o_proj" in name or "down" in name else 0.05
            assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel())), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name

    def test_no_two_matrices_are_alike(self) -> None:
        drawn = [p for p in build_model(small_config()).parameters() if p.dim() > 1]
        starts = {tuple((p.flatten()[:4] / p.std()).tolist()) for p in drawn}
        assert len(starts) == len(drawn)

    def test_tied_embeddings_are_one_parameter(self) -> None:
        tied, untied = build_model(small_config(tie_embeddings=True)), build_model(small_config())
        assert tied.head.weight is tied.embedding.weight
        assert "head.weight" not in dict(tied.named_parameters())
        assert torch.equal(tied.embedding.weight, untied.embedding.weight)
        assert not torch.equal(untied.head.weight, untied.embedding.weight)
        hidden = tied.hidden_states(random_tokens(4))
        torch.testing.assert_close(tied.logits(random_tokens(4)), hidden @ tied.embedding.weight.T)


def built_weights(expert: int) -> dict[str, torch.Tensor]:
    model = build_model(small_config(), Groups(Topology(1, 2, expert=expert)))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(load_config(path, []), id=path.stem) for path in sorted(CONFIGS.glob("*.yaml"))),
        *(small_config(moe) for moe in WITH_DENSE),
        *(small_config(**{key: True}) for key, field in Model.model_fields.items() if field.annotation is bool),
    ],
)
def test_the_planner_counts_every_parameter(config: Config) -> None:
    with torch.device("meta"):
        model = Transformer(config, ExpertGroup.alone(), TensorGroup.alone())
    counts = count_parameters(config)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def total(*parts: str) -> int:
        return sum(size for name, size in counted.items() if any(part in name for part in parts))

    assert counts.total == sum(counted.values())
    assert counts.experts == total(".experts.")
    assert counts.router == total(".gate.")
    assert counts.shared_experts == total(".shared.", ".mlp.")
    assert counts.residual_mix == total(".coefficient.")
    assert counts.attention == total("_proj.")
    assert counts.norms == total("norm.")
    assert counts.embedding == total("embedding.")
    held = sum(p.numel() for p in model.parameters() if hasattr(p, "group_name"))
    assert held == counts.experts, "what DeepSpeed is told are experts"


def count_grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    *_: Any,
    out_val: torch.Tensor | None = None,
    **__: Any,
) -> int:
    """2 * rows * K * M over the rows inside a group: [N, K] x [L, K, M], or the weight's gradient [K, N] x [N, M]."""
    assert offs is not None
    rows = int(offs[-1])
    return 2 * rows * right.shape[-1] * (left.shape[1] if right.dim() == 3 else left.shape[0])


count_grouped_mm._get_raw = True  # the counter then passes tensors, not shapes


def measure_flops(model: nn.Module, tokens: torch.Tensor) -> tuple[int, int]:
    """(forward, forward and backward), without the loss's own recomputation of the logits."""
    counts = []
    mapping = {torch.ops.aten._grouped_mm: count_grouped_mm}
    for backward in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel of the CPU has no formula
            loss = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


@pytest.mark.parametrize("moe", [MOE, SWITCH, None, *WITH_DENSE])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_planners_flops_are_those_that_torch_counts(moe: dict[str, Any] | None, tie_embeddings: bool) -> None:
    config = small_config(moe, tie_embeddings=tie_embeddings)
    tokens = random_tokens(33)
    forward, training = measure_flops(build_model(config), tokens)
    planned = flops_per_token(config, count_parameters(config), 32)
    assert forward == pytest.approx(planned.forward * 2 * 32, rel=0.02)
    assert training == pytest.approx(planned.training * 2 * 32, rel=0.02)
