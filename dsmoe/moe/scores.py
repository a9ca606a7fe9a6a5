"""Registries of the router: scores of logits, scores of groups of experts, and noise.

An entry holds everything that depends on its name. A new name needs an entry here and a place in the field's type in
`dsmoe.config.sections.moe`; a score also needs a branch in `dsmoe.kernels.topk_router`.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmoe.moe.replay import uniform

TINY = 1e-20
"""Added to a sum of scores before dividing by it, as DeepSeek-V3 does: sigmoids can all underflow to 0."""
JITTER = 1e-2
"""Half-width of the uniform factor that `jitter` multiplies the router's input with (Switch Transformer, sec. 2.2)."""

Noised = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """A map from logits [T, E] to scores [T, E].

    Attributes:
        name: its key in `SCORES`.
        of_logits: the scores; autograd must be able to differentiate it.
        over_experts: from scores to probabilities, which add up to 1 over the experts of a token.
        kernel: the code of its branch in `dsmoe.kernels.topk_router`; None without one.
    """

    name: str
    of_logits: Callable[[torch.Tensor], torch.Tensor]
    over_experts: Callable[[torch.Tensor], torch.Tensor]
    kernel: str | None


def _softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.softmax(dim=-1)


def _sigmoid(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.sigmoid()


def as_they_are(scores_TE: torch.Tensor) -> torch.Tensor:
    """Return scores that add up to 1 already."""
    return scores_TE


def over_their_sum(scores_TE: torch.Tensor) -> torch.Tensor:
    """Return scores divided by their sum; they are not negative, and add up to anything (DeepSeek-V3, eq. 19)."""
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + TINY)


SCORES = {
    "softmax": Score("softmax", _softmax, as_they_are, kernel="softmax"),
    "sigmoid": Score("sigmoid", _sigmoid, over_their_sum, kernel="sigmoid"),
}
"""Softmax over the experts (Shazeer et al. 2017), and the sigmoid of each logit (DeepSeek-V3, eq. 15)."""


def _best(preference_TGx: torch.Tensor) -> torch.Tensor:
    return preference_TGx.amax(dim=-1)


def _best_two(preference_TGx: torch.Tensor) -> torch.Tensor:
    return preference_TGx.topk(2, dim=-1).values.sum(dim=-1)


GROUP_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"max": _best, "top2_sum": _best_two}
"""The score of a group of experts, [T, G, x] -> [T, G]: its best expert (DeepSeek-V2), or the sum of its best two
(DeepSeek-V3)."""


@dataclass(frozen=True)
class Noise:
    """Noise of routing in training; each function takes a tensor and the key to draw from.

    Attributes:
        on_input: the router's input [T, D] with the noise, in fp32; None leaves it alone.
        on_choice: the logits [T, E] whose scores choose; None chooses by the logits that weigh.
    """

    on_input: Noised | None = None
    on_choice: Noised | None = None

    @property
    def is_random(self) -> bool:
        """True if anything is drawn."""
        return self.on_input is not None or self.on_choice is not None


def _jitter(x_TD: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
    return x_TD.float() * (1.0 - JITTER + 2 * JITTER * uniform(key, x_TD.shape, x_TD.device))


def _gumbel(logits_TE: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
    return logits_TE - uniform(key, logits_TE.shape, logits_TE.device).log().neg().log()


NOISES = {"none": Noise(), "jitter": Noise(on_input=_jitter), "gumbel": Noise(on_choice=_gumbel)}
"""None, the input times uniform noise (Switch Transformer), and Gumbel-top-k (Kool et al. 2019)."""
