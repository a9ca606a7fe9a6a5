"""Corpora to micro-batches: documents, tokens, cache, order, loaders, and the bigram baseline."""

from dsmoe.data.baseline import bigram_nats
from dsmoe.data.cache import prepare
from dsmoe.data.loader import TrainLoader, ValidationLoader
from dsmoe.data.prepared import PreparedSource
from dsmoe.data.tokenizer import load_tokenizer

__all__ = [
    "PreparedSource",
    "TrainLoader",
    "ValidationLoader",
    "bigram_nats",
    "load_tokenizer",
    "prepare",
]
