"""Bigram model of held-out text: the loss that a trained model has to beat."""

from __future__ import annotations

import math

import numpy as np

from dsmoe.data.prepared_source import PreparedSource

MAX_TRAIN_TOKENS = 50_000_000
MAX_HELD_OUT_TOKENS = 1_000_000
HELD_OUT_FRACTION = 0.05
EM_STEPS = 10


def bigram_nats(source: PreparedSource, vocab_size: int, sequences: np.ndarray) -> float:
    """Sum the cross entropy, in nats, of every token but the first of each sequence under an interpolated bigram model.

    p(b | a) = w2 * count(a, b) / count(a) + w1 * count(b) / count + w0 / vocab_size (Jelinek and Mercer 1980). For an
    `a` that was never counted, the unigram term replaces the bigram term. Counts come from the first 95 % of the first
    50 million training tokens, the weights from the remaining 5 % by expectation maximisation.

    Args:
        source: from `prepare`; only its training part is read.
        vocab_size: vocabulary size of the evaluated model; every token is below it.
        sequences: `[N, S + 1]` tokens of the evaluation.
    """
    tokens = _training_tokens(source)
    num_held_out = min(MAX_HELD_OUT_TOKENS, math.ceil(HELD_OUT_FRACTION * len(tokens)))
    model = _Bigram(tokens[:-num_held_out], vocab_size)
    model.fit_weights(tokens[-num_held_out - 1 :])
    return sum(model.nats(sequence) for sequence in sequences)


def _training_tokens(source: PreparedSource) -> np.ndarray:
    """Return the first training tokens of a source, without those that another source holds out."""
    size = min(source.train_tokens, MAX_TRAIN_TOKENS)
    is_trained_on = np.ones(size, dtype=bool)
    for begin, end in source.left_out:
        is_trained_on[begin:end] = False
    return source.train_file.read(0, size)[is_trained_on]


class _Bigram:
    """Counts of tokens and of pairs of neighbours; the pair (a, b) has the id a * vocab_size + b."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self._vocab_size = vocab_size
        self._pairs, self._pair_counts = np.unique(self._pair_ids(tokens), return_counts=True)
        self._context_counts = np.bincount(tokens[:-1], minlength=vocab_size)
        self._unigram = np.bincount(tokens, minlength=vocab_size) / len(tokens)
        self._weights = np.full(3, 1 / 3)

    def fit_weights(self, tokens: np.ndarray) -> None:
        """Fit the weights by expectation maximisation to tokens[1:], none of whose pairs were counted."""
        terms_T3 = self._terms(tokens)
        for _ in range(EM_STEPS):
            shares_T3 = terms_T3 * self._weights
            shares_T3 /= shares_T3.sum(axis=1, keepdims=True)
            self._weights = shares_T3.mean(axis=0)

    def nats(self, tokens: np.ndarray) -> float:
        """Return the cross entropy, in nats, of tokens[1:], each given its predecessor."""
        return float(-np.log(self._terms(tokens) @ self._weights).sum())

    def _pair_ids(self, tokens: np.ndarray) -> np.ndarray:
        numbers = tokens.astype(np.int64)
        return numbers[:-1] * self._vocab_size + numbers[1:]

    def _terms(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bigram, unigram and uniform probabilities of tokens[1:], `[tokens - 1, 3]` float64."""
        pairs = self._pair_ids(tokens)
        place = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        counts = np.where(self._pairs[place] == pairs, self._pair_counts[place], 0)
        contexts = self._context_counts[tokens[:-1]]
        unigram = self._unigram[tokens[1:]]
        bigram = np.where(contexts > 0, counts / np.maximum(contexts, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(pairs), 1 / self._vocab_size)], axis=1)
