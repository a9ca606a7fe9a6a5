"""The router's kernels against the same formulas in float64, and their choices under ties, infinities and NaN."""

from __future__ import annotations

import pytest
import torch

from dsmoe.kernels.topk_router import route
from dsmoe.moe.scores import SCORES
from tests.moe import DEVICE

TINY = 1e-20
WITH_KERNEL = [name for name, entry in SCORES.items() if entry.kernel is not None]
SHAPES = [(70, 13, 3), (1, 1, 1), (33, 8, 8), (0, 4, 2), (5, 300, 7), (130, 64, 6)]
"""T, E, K."""
USED = [
    (used, shape)
    for used in ("both", "scores", "weights")
    # On a GPU every one of them is a kernel to compile.
    for shape in (SHAPES if used == "both" or DEVICE == "cpu" else SHAPES[:1])
]
"""Which of the two results has a gradient, at which shape."""


def by_hand(
    logits_TE: torch.Tensor, experts_TK: torch.Tensor, score: str, normalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores_TE = {"softmax": logits_TE.softmax(-1), "sigmoid": logits_TE.sigmoid()}[score]
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    return scores_TE, weights_TK * scale


def in_order(preference_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts from the most preferred on, the lower first of equals."""
    return preference_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


@pytest.mark.parametrize("score", WITH_KERNEL)
@pytest.mark.parametrize(("normalize", "scale"), [(True, 2.5), (False, 1.0)])
@pytest.mark.parametrize(("used", "shape"), USED, ids=str)
def test_kernels_are_their_twin(
    score: str, normalize: bool, scale: float, used: str, shape: tuple[int, int, int]
) -> None:
    num_tokens, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(num_experts)
    logits_TE = (2 * torch.randn(num_tokens, num_experts, generator=generator)).to(DEVICE).requires_grad_()
    wide_TE = logits_TE.detach().double().requires_grad_()

    scores_TE, weights_TK, experts_TK = route(logits_TE, None, None, top_k, SCORES[score], normalize, scale, TINY)
    expected = by_hand(wide_TE, experts_TK, score, normalize, scale)

    assert (experts_TK.dtype, experts_TK.shape) == (torch.int64, (num_tokens, top_k))
    assert torch.equal(experts_TK, in_order(scores_TE, top_k))
    assert not experts_TK.requires_grad
    for actual, double in zip((scores_TE, weights_TK), expected, strict=True):
        torch.testing.assert_close(actual.double(), double, rtol=2e-6, atol=0)
    upstream = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in expected]
    chosen = {"both": (0, 1), "scores": (0,), "weights": (1,)}[used]
    sum(((scores_TE, weights_TK)[i] * upstream[i]).sum() for i in chosen).backward()
    sum((expected[i] * upstream[i].double()).sum() for i in chosen).backward()
    torch.testing.assert_close(logits_TE.grad.double(), wide_TE.grad, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("score", WITH_KERNEL)
def test_gradients_that_come_expanded(score: str) -> None:
    """What `.sum()` sends back has strides of 0."""
    logits_TE = torch.randn(20, 6, device=DEVICE, requires_grad=True)
    scores_TE, weights_TK, experts_TK = route(logits_TE, None, None, 2, SCORES[score], False, 1.0, TINY)
    (scores_TE.sum() + weights_TK.sum()).backward()
    wide_TE = logits_TE.detach().double().requires_grad_()
    sum(tensor.sum() for tensor in by_hand(wide_TE, experts_TK, score, False, 1.0)).backward()
    torch.testing.assert_close(logits_TE.grad.double(), wide_TE.grad, rtol=1e-5, atol=1e-6)


def test_bias_chooses_and_does_not_weigh() -> None:
    logits_TE = torch.randn(50, 10, device=DEVICE)
    bias_E = torch.linspace(-1, 1, 10, device=DEVICE)
    scores_TE, weights_TK, experts_TK = route(logits_TE, bias_E, None, 3, SCORES["sigmoid"], False, 1.0, TINY)
    assert torch.equal(experts_TK, in_order(scores_TE + bias_E, 3))
    assert not torch.equal(experts_TK, in_order(scores_TE, 3))
    assert torch.equal(weights_TK, scores_TE.gather(1, experts_TK))


def test_a_preference_chooses_instead() -> None:
    """Also where it leaves fewer than K experts above -inf, is negative, or ties."""
    logits_TE = torch.randn(60, 12, device=DEVICE)
    preference_TE = torch.randint(-2, 3, (60, 12)).float().to(DEVICE)
    preference_TE[:, 3:] = preference_TE[:, 3:].masked_fill(torch.rand(60, 9, device=DEVICE) < 0.8, -torch.inf)
    _, _, experts_TK = route(logits_TE, None, preference_TE, 5, SCORES["softmax"], True, 1.0, TINY)
    assert torch.equal(experts_TK, in_order(preference_TE, 5))


@pytest.mark.parametrize("score", WITH_KERNEL)
def test_the_lower_of_equal_experts_goes_first(score: str) -> None:
    logits_TE = torch.randint(0, 3, (100, 20)).float().to(DEVICE)
    logits_TE[0], logits_TE[1] = 0.0, -300.0
    logits_TE[2] = torch.cat([torch.full((10,), -300.0), torch.full((10,), 300.0)])
    scores_TE, _, experts_TK = route(logits_TE, None, None, 6, SCORES[score], True, 1.0, TINY)
    assert torch.equal(experts_TK, in_order(scores_TE, 6))
    zeros_TE = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=DEVICE)
    assert route(zeros_TE, None, zeros_TE, 4, SCORES[score], True, 1.0, TINY)[2].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("score", WITH_KERNEL)
def test_experts_exist_and_differ_whatever_the_logits(score: str) -> None:
    logits_TE = torch.randn(6, 5, device=DEVICE)
    logits_TE[0], logits_TE[1, 2], logits_TE[2], logits_TE[3, 1] = torch.nan, torch.nan, torch.inf, torch.inf
    logits_TE[4], logits_TE[5, 3] = -torch.inf, -torch.nan
    _, weights_TK, experts_TK = route(logits_TE, None, logits_TE, 4, SCORES[score], True, 1.0, TINY)
    assert torch.equal(experts_TK, in_order(logits_TE, 4))
    assert weights_TK[1].isnan().any()
