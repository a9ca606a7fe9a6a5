"""Floating-point operations per token: the numerator of MFU, by two conventions.

Model FLOPs as in PaLM, appendix B (arXiv:2204.02311): what the mathematics needs, not what the devices happen to do.
Recomputed activations, padding to capacity and tokens that were dropped change the time, not this count.

PaLM, and torch's flop counter, count attention in full. Megatron-LM's published figures count half of it, because the
causal mask leaves half of the scores ("causal" here). Compare a figure with one of the same convention.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.config.schema import Config
from dsmoe.plan.layers import head_dim, num_moe_layers
from dsmoe.plan.parameters import ParameterCounts


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiply and an add are two."""

    forward: int
    """One forward pass, attention in full."""
    attention: int
    """Its part of attention's scores and values, in full."""

    @property
    def training(self) -> int:
        """Forward and backward, which does two products (for the input and for the weight) per forward product."""
        return 3 * self.forward

    @property
    def causal_training(self) -> int:
        """The same with half of the attention, as Megatron-LM counts."""
        return 3 * (self.forward - self.attention // 2)


def flops_per_token(config: Config, counts: ParameterCounts, sequence_length: int | None = None) -> Flops:
    """Count the matrix products per token, averaged over a sequence.

    Args:
        config: the run.
        counts: its `count_parameters`.
        sequence_length: tokens of a sequence; `train.sequence_length` by default.

    What is counted:

    - Projections: every weight of a matrix that a token meets is one multiply and one add. That is attention, dense
      SwiGLU, router, the K chosen experts, a shared expert or residual MLP with its coefficients, and the output head
      (tied or not). The embedding is a lookup: free.
    - Attention: scores (Q K^T) and values (P V) are each 2 * sequence_length * num_heads * head_dim per token and
      layer.
    - Norms, biases, rotary positions, softmax and activation functions are not matrix products: left out.
    """
    model, sequence_length = config.model, sequence_length or config.train.sequence_length
    head = model.vocab_size * model.hidden_size
    biases = 2 * num_moe_layers(config) if counts.residual_mix else 0
    every_token = counts.attention + counts.dense_ffn + counts.router + counts.shared_experts + counts.residual_mix
    matrices = every_token - biases + counts.active_experts + head
    attention = model.num_layers * 2 * 2 * sequence_length * model.num_heads * head_dim(model)
    return Flops(forward=2 * matrices + attention, attention=attention)
