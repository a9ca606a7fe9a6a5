"""Which sequence is read when: a pure function of the seed and the sample number, without state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dsmoe.config.errors import UserError

BLOCK = 1024
"""Samples in which every source has its exact share."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1

# Uses of a key that must not share random numbers.
_BLOCK_KEY = 0
_EPOCH_KEY = 1


def permute(index: np.ndarray, length: int, key: np.ndarray) -> np.ndarray:
    """Send `index` through a pseudo-random permutation of `range(length)`, without a table, for any length below 2^63.

    A Feistel network over pairs (left, right) in `side` x `side >= length`, walked along its cycle until it is back
    inside the range (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        index: `[...]` integers in `range(length)`.
        length: size of the range.
        key: uint64, `[...]` or broadcast to it; every key is another permutation (see `make_key`).

    Returns:
        `[...]` int64. For a fixed key, a bijection of `range(length)`.
    """
    index, key = np.broadcast_arrays(np.atleast_1d(np.asarray(index, dtype=np.uint64)), key)
    assert index.size == 0 or int(index.max()) < length
    side = np.uint64(math.isqrt(length - 1) + 1)
    result = _feistel(index, side, key)
    outside = result >= length
    while outside.any():
        result[outside] = _feistel(result[outside], side, key[outside])
        outside = result >= length
    return result.astype(np.int64)


def make_key(*parts: int | np.ndarray) -> np.ndarray:
    """Hash non-negative integers, or `[n]` arrays of them, in order, to keys `[n]` or `[1]` uint64."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = np.atleast_1d(np.asarray(part & _MASK if isinstance(part, int) else part).astype(np.uint64))
        key = _mix((key + _GOLDEN) ^ _mix(number + _GOLDEN))
    return key


def _feistel(index: np.ndarray, side: np.uint64, key: np.ndarray) -> np.ndarray:
    """Permute `range(side * side)`: each round only adds a function of `right` to `left`, modulo `side`."""
    left, right = np.divmod(index, side)
    for number in range(1, _ROUNDS + 1):
        round_key = _mix(key + np.array([number], dtype=np.uint64) * _GOLDEN)
        left, right = right, (left + _mix(round_key ^ right) % side) % side
    return left * side + right


def _mix(number: np.ndarray) -> np.ndarray:
    """Scramble uint64, one to one, with the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


class Mixture:
    """An endless sequence of samples drawn from several sources.

    Guaranteed, for every seed:

    * sample `i` is a function of (lengths, weights, seed, `i`) alone;
    * every aligned block of 1024 samples has the same number of samples of a source: 1024 * weight / sum(weights),
      up or down to a whole number. A source too light for one sample gets one, at the heaviest source's expense;
    * the samples of one source, in the order they come, go through all its sequences once (an epoch), then through
      all of them once again in another order, and so on.

    Args:
        lengths: number of sequences of each source.
        weights: shares of the samples, relative to each other.
        seed: decides both orders.

    Raises:
        UserError: more sources than a block has samples.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        assert len(lengths) == len(weights)
        assert min(lengths) > 0
        assert min(weights) > 0
        self._lengths = list(lengths)
        self._seed = seed
        self._shares = _block_shares(weights)
        self._sources_of_share = np.repeat(np.arange(len(lengths)), self._shares)
        starts = np.cumsum(self._shares) - self._shares
        self._rank_in_share = np.arange(BLOCK) - np.repeat(starts, self._shares)

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the samples `first` to `first + count - 1`: their sources and sequences, each `[count]` int64."""
        if count == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        first_block, offset = divmod(first, BLOCK)
        last_block = (first + count - 1) // BLOCK
        blocks = np.arange(first_block, last_block + 1)
        source_NK, number_NK = self._blocks(blocks)
        sources = source_NK.reshape(-1)[offset : offset + count]
        numbers = number_NK.reshape(-1)[offset : offset + count]
        sequences = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            epochs, indices = np.divmod(numbers[mine], self._lengths[source])
            keys = make_key(self._seed, _EPOCH_KEY, int(source), epochs)
            sequences[mine] = permute(indices, self._lengths[source], keys)
        return sources, sequences

    def counts(self, total: int) -> np.ndarray:
        """Count how many of the first `total` samples come from each source, `[sources]` int64."""
        full_blocks, rest = divmod(total, BLOCK)
        source_NK, _ = self._blocks(np.array([full_blocks]))
        return full_blocks * self._shares + np.bincount(source_NK[0, :rest], minlength=len(self._lengths))

    def _blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give each sample of N blocks of K = 1024 its source and its number among that source's samples, `[N, K]`."""
        key_N1 = make_key(self._seed, _BLOCK_KEY, blocks)[:, None]
        source_NK = self._sources_of_share[permute(np.arange(BLOCK)[None, :], BLOCK, key_N1)]
        # A stable sort groups each block's positions by source and keeps their order in time.
        position_NK = np.argsort(source_NK, axis=1, kind="stable")
        rank_NK = np.empty_like(source_NK)
        np.put_along_axis(rank_NK, position_NK, self._rank_in_share[None, :], axis=1)
        return source_NK, blocks[:, None] * self._shares[source_NK] + rank_NK


def _block_shares(weights: Sequence[float]) -> np.ndarray:
    """Round to whole samples per block, `[sources]` int64, by largest remainder; at least one each."""
    if len(weights) > BLOCK:
        raise UserError(f"data.sources: {len(weights)} sources, at most {BLOCK} can be mixed; put files together")
    exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * BLOCK
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: BLOCK - int(shares.sum())]] += 1
    for source in np.flatnonzero(shares == 0):
        shares[np.argmax(shares)] -= 1
        shares[source] = 1
    return shares
