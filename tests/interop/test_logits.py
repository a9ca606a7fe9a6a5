"""Comparison of logits: rounding passes for the same, other weights do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsmoe.interop.logits import compare

CHANGES: dict[str, tuple[Callable[[torch.Tensor], object], bool]] = {
    "rounding everywhere": (lambda x: x.mul_(1 + 1e-5), True),
    "a twentieth everywhere": (lambda x: x.mul_(1.05), False),
    "another expert for one token": (lambda x: x[0, 3].add_(0.02), True),
    "another expert for every third token": (lambda x: x[:, ::3].add_(0.02), False),
    "one token that is wrong": (lambda x: x[1, 5].mul_(-1), False),
    "one that is not a number": (lambda x: x[1, 5, 0].fill_(float("nan")), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rounding_passes_and_nothing_else(change: str) -> None:
    ours = torch.randn(2, 64, 100, generator=torch.Generator().manual_seed(0))
    theirs = ours.clone()
    apply, holds = CHANGES[change]
    apply(theirs)
    agreement = compare(ours, theirs)
    assert agreement.holds == holds
    assert agreement.scale == pytest.approx(1.0, abs=0.02)
    assert ("of the tokens apart" in str(agreement)) == (change != "rounding everywhere")
