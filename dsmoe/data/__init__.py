"""Data pipeline from corpora to micro-batches: documents, tokens, cache, sampling order, loaders, bigram baseline.

The public names are imported lazily, at their first use, so that reading the cache imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe.data.bigram_baseline import bigram_nats
    from dsmoe.data.cache import prepare
    from dsmoe.data.loader import TrainLoader, ValidationLoader
    from dsmoe.data.prepared_source import PreparedSource
    from dsmoe.data.tokenizer import load_tokenizer

__all__ = [
    "PreparedSource",
    "TrainLoader",
    "ValidationLoader",
    "bigram_nats",
    "load_tokenizer",
    "prepare",
]

_MODULES = {
    "PreparedSource": "dsmoe.data.prepared_source",
    "TrainLoader": "dsmoe.data.loader",
    "ValidationLoader": "dsmoe.data.loader",
    "bigram_nats": "dsmoe.data.bigram_baseline",
    "load_tokenizer": "dsmoe.data.tokenizer",
    "prepare": "dsmoe.data.cache",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dsmoe.data' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
