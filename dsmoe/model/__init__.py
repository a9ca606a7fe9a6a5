"""A decoder-only transformer whose feed-forward blocks are MoE layers where the config says so."""

from dsmoe.model.transformer import Transformer, build_model

__all__ = ["Transformer", "build_model"]
