"""Grouped-query causal self-attention with rotary positions.

Shape suffixes: see `dsmoe.moe`; G key/value heads of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.config.schema import Model
from dsmoe.nn.linear import ColumnParallelLinear, RowParallelLinear, SharedColumnParallelLinear
from dsmoe.nn.norm import RMSNorm
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import enter_tensor_parallel_region
from dsmoe.plan.layers import head_dim, num_kv_heads


class Attention(nn.Module):
    """Causal attention in which query heads share key/value heads in equal parts (Ainslie et al. 2023).

    Over a tensor group every rank has its part of the query heads and the key/value heads that they use: its part of
    the key/value heads, or one that neighbours have too, where these heads are fewer than the ranks.
    """

    def __init__(self, model: Model, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        self.head_dim = head_dim(model)
        all_kv_heads = num_kv_heads(model)
        self.num_heads = model.num_heads // group.size
        # Fewer key/value heads than ranks: every rank has one, the same as some neighbours.
        self.num_kv_heads = max(1, all_kv_heads // group.size)
        self.q_proj = ColumnParallelLinear(model.hidden_size, model.num_heads * self.head_dim, group)
        self.k_proj = _key_value(model.hidden_size, all_kv_heads, self.head_dim, group)
        self.v_proj = _key_value(model.hidden_size, all_kv_heads, self.head_dim, group)
        self.o_proj = RowParallelLinear(model.num_heads * self.head_dim, model.hidden_size, group)
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps, group) if model.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps, group) if model.qk_norm else nn.Identity()

    def forward(self, x_BSD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; `rotary` is the result of `Rotary` for all positions."""
        x_BSD = enter_tensor_parallel_region(x_BSD, self.group)
        batch, length, _ = x_BSD.shape
        q_BSHF = self.q_norm(self.q_proj(x_BSD).view(batch, length, self.num_heads, self.head_dim))
        k_BSGF = self.k_norm(self.k_proj(x_BSD).view(batch, length, self.num_kv_heads, self.head_dim))
        v_BSGF = self.v_proj(x_BSD).view(batch, length, self.num_kv_heads, self.head_dim)
        out_BHSF = F.scaled_dot_product_attention(
            # Rotated before the transpose, while the angles [S, 1, F] broadcast over the heads.
            rotate(q_BSHF, rotary).transpose(1, 2),
            rotate(k_BSGF, rotary).transpose(1, 2),
            v_BSGF.transpose(1, 2),
            is_causal=True,
            # Without it keys and values would have to be repeated in memory for each query head.
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(out_BHSF.transpose(1, 2).reshape(batch, length, -1))


def _key_value(hidden_size: int, num_heads: int, head_dim: int, group: TensorGroup) -> nn.Linear:
    """Make the projection onto this rank's key or value heads."""
    if num_heads % group.size == 0:
        return ColumnParallelLinear(hidden_size, num_heads * head_dim, group)
    return SharedColumnParallelLinear(hidden_size, num_heads * head_dim, num_heads, group)


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
        """Return the (cosines, sines) of positions 0..length-1, each [S, 1, F] fp32."""
        positions = torch.arange(length, device=self.inverse_frequency.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inverse_frequency.float())
        # Feature i and i + F / 2 are a pair, and turn by the same angle.
        angles = torch.cat([angles, angles], dim=-1)[:, None, :]
        return angles.cos(), angles.sin()


def rotate(x_BSHF: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each head's vector by its position's angles in fp32; the result has the vector's dtype."""
    cosines, sines = rotary
    first, second = x_BSHF.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BSHF.float() * cosines + turned * sines).to(x_BSHF.dtype)
