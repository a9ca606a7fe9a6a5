"""Cross entropy over a large vocabulary without the logits ever standing whole in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**25
"""Most fp32 logits alive at a time: 128 MiB, and as much again in the backward pass."""


def token_losses(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each of N tokens in nats, [N] fp32.

    Chunks of tokens are projected onto the vocabulary one after the other, and again in the backward pass.
    `torch.nn.functional.linear_cross_entropy` does the same in one call, but returns a bf16 loss for bf16 weights.

    Args:
        hidden_ND: the last hidden states, any dtype.
        head_VD: the output head.
        targets_N: int64.
    """
    chunk = max(1, LOGITS_PER_CHUNK // head_VD.shape[0])
    pieces = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([checkpoint(_losses, hidden, head_VD, targets, use_reentrant=False) for hidden, targets in pieces])


def _losses(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden_ND, head_VD).float(), targets_N, reduction="none")
