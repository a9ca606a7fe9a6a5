"""Grouped-query causal self-attention with rotary positions.

Shape suffixes of `dsmoe.model`: B sequences, S positions, D hidden, H query heads, G key/value heads, P head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.config.schema import Model
from dsmoe.plan.layers import head_dim, num_kv_heads


class Attention(nn.Module):
    """Causal attention in which H / G query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        self.num_kv_heads = num_kv_heads(model)
        self.head_dim = head_dim(model)
        self.q_proj = nn.Linear(model.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, model.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=model.norm_eps) if model.qk_norm else nn.Identity()

    def forward(self, x_BSD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; `rotary` is what `Rotary` returns for S positions."""
        batch, length, _ = x_BSD.shape
        q_BSHP = self.q_norm(self.q_proj(x_BSD).view(batch, length, self.num_heads, self.head_dim))
        k_BSGP = self.k_norm(self.k_proj(x_BSD).view(batch, length, self.num_kv_heads, self.head_dim))
        v_BSGP = self.v_proj(x_BSD).view(batch, length, self.num_kv_heads, self.head_dim)
        out_BHSP = F.scaled_dot_product_attention(
            rotate(q_BSHP, rotary).transpose(1, 2),
            rotate(k_BSGP, rotary).transpose(1, 2),
            v_BSGP.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(out_BHSP.transpose(1, 2).reshape(batch, length, -1))


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), halves rotated as in Llama and Qwen."""

    inverse_frequency: torch.Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inverse_frequency", theta**-exponents, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rotary:
        """Move with the model, but stay fp32: after `model.bfloat16()` every angle would be off by up to 0.4 %."""
        exact = self.inverse_frequency
        super()._apply(fn, recurse)
        if self.inverse_frequency.dtype != exact.dtype:
            self.inverse_frequency = exact.to(self.inverse_frequency.device)
        return self

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The (cosines, sines) of positions 0..length-1, each [S, 1, P] fp32."""
        positions = torch.arange(length, device=self.inverse_frequency.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inverse_frequency.float())
        angles = torch.cat([angles, angles], dim=-1)[:, None, :]
        return angles.cos(), angles.sin()


def rotate(x_BSHP: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn each head's vector by its position's angles, in fp32, and return it in its own dtype."""
    cosines, sines = rotary
    first, second = x_BSHP.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BSHP.float() * cosines + turned * sines).to(x_BSHP.dtype)
