"""Step 1, route: which experts each token goes to, and with what weight.

Shape suffixes of `dsmoe.moe`: T tokens of this rank, D hidden, E experts, K choices per token, A = T * K assignments
(token-major), N rows, L experts of this rank, R ranks of the expert group, C capacity, I inner width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

NOISE_POLICIES = (None, "None", "Jitter", "RSample")
JITTER = 1e-2
"""Half-width of the uniform factor that `Jitter` multiplies the router's input with (Switch Transformer, sec. 2.2)."""


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens.

    `weights_TK` (fp32, differentiable) and `experts_TK` (int64) are in order of falling score, of the noisy one where
    `RSample` chooses. Tokens that are masked out have expert E, which does not exist, and weight 0. `logits_TE` and
    `scores_TE` (fp32) are without Gumbel noise; jitter is in them, as it is in the router's input.
    """

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    mask_T: torch.Tensor | None


class Router(nn.Module):
    """Softmax over all experts in fp32, then the k best (Shazeer et al. 2017; Switch Transformer for k = 1).

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, the same semantics for every value.
        normalize_weights: divide the k chosen scores by their sum, as Mixtral and Qwen3 do.
        noise: None, or what DeepSpeed's `noisy_gate_policy` calls `Jitter` (the input is multiplied by uniform noise)
            or `RSample` (Gumbel noise on the logits for the selection only). In training only.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, normalize_weights: bool, noise: str | None = None
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"k ({top_k}) must be between 1 and num_experts ({num_experts})")
        if noise not in NOISE_POLICIES:
            raise ValueError(f"noisy_gate_policy must be one of {NOISE_POLICIES}, not {noise!r}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.normalize_weights = normalize_weights
        self.noise = None if noise == "None" else noise
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: torch.Tensor, mask_T: torch.Tensor | None = None) -> Routing:
        """Route [T, D] tokens of any dtype; where `mask_T` is 0 or False the token goes nowhere."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.noise == "Jitter":
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1.0 - JITTER, 1.0 + JITTER)
            logits_TE = F.linear(x_TD, self.weight.float())
            scores_TE = logits_TE.softmax(dim=-1)
        if self.training and self.noise == "RSample":
            gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
            experts_TK = (logits_TE.detach() + gumbel_TE).topk(self.top_k, dim=-1).indices
            weights_TK = scores_TE.gather(1, experts_TK)
        else:
            weights_TK, experts_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.normalize_weights:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if mask_T is not None:
            mask_T = mask_T.reshape(-1).bool()
            experts_TK = torch.where(mask_T[:, None], experts_TK, self.num_experts)
            weights_TK = torch.where(mask_T[:, None], weights_TK, 0.0)
        return Routing(logits_TE, scores_TE, weights_TK, experts_TK, mask_T)
