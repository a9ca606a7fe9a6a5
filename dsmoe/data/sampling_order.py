"""Sampling order: the sequence of every sample as a pure function of the seed and the sample number, without state.

Step t of a run reads the samples t * n to (t + 1) * n - 1, with n sequences per step, on any number of ranks. Suffixes
of array names: N blocks, K samples of a block.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ORDER_VERSION = 2
"""Changes whenever the order does; checkpoints record it. (Version 1 rounded shares to multiples of 1/1024.)"""
BLOCK = 64
"""Samples that are shuffled with each other."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1

# The uses of random numbers, each with keys of its own so that no two share a number.
_BLOCK_KEY = 0
_EPOCH_KEY = 1
_TREE_KEY = 2


def permute(index: np.ndarray, length: int, key: np.ndarray) -> np.ndarray:
    """Apply a pseudo-random permutation of `range(length)` to `index`, without a table, for any length below 2^63.

    A Feistel network permutes the pairs (left, right) of `side * side >= length` numbers. A result outside the range
    goes through the network again until it is inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    With length 7, side is 3 and the network permutes 0 to 8; if it sends 2 to 8 and 8 to 5, the result for 2 is 5.

    Args:
        index: `[...]` integers in `range(length)`.
        length: size of the range.
        key: uint64, `[...]` or broadcast to it, from `make_key`; every key is another permutation.

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
    """Hash a sequence of non-negative integers, or of `[n]` arrays of them, to keys, `[1]` or `[n]` uint64."""
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
    """An endless sequence of samples from several sources in proportion to their weights.

    Guaranteed, for every seed:

    * sample `i` is a function of (names, lengths, weights, seed, `i`) alone, in whatever order the sources are given;
    * of the first n samples, n a multiple of 64, a source of share p = weight / sum(weights) has n * p, up to less than
      4 more or fewer, however small its weight and however many sources there are; between multiples of 64, up to
      64 * p more or fewer on top;
    * the samples of one source, in their order, go through all its sequences once (an epoch), then through all of them
      again in another order, and so on.

    With seed 0, source a of 3 sequences and weight 3, and source b of 2 sequences and weight 1:

        sample      0  1  2  3  4  5  6  7       48 of the first 64 samples are from a, 16 from b
        source      a  a  b  b  a  a  a  b
        sequence    0  1  1  0  2  0  1  0       a: 0 1 2, then 0 1 2, then 1 0 2; b: 1 0, then 0 1, ...
        with 4 sequences a step, step 1 trains on samples 4 to 7, in every run and after every resume

    Shares are exact: the sources are the leaves of a binary tree, and of the first m samples that reach an inner node,
    floor(m * P + U) go to its left child, where P is the left child's share of the node and U, in [0, 1), is drawn from
    the seed. So the number of a sample within its source follows from its overall number by one multiplication per
    level. The tree is Huffman's: a sample passes log2(sources) levels or fewer on average, and because no inner node
    has more than two thirds of its parent's share, the roundings of all levels add up to less than 4 samples.

    Args:
        lengths: number of sequences of each source.
        weights: shares of the samples, relative to each other.
        seed: decides the order of the sources and of the sequences in each.
        names: names of the sources, all different, on which the order within each depends; by default, their numbers.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int, names: Sequence[str] | None = None):
        assert len(lengths) == len(weights)
        assert min(lengths) > 0
        assert min(weights) > 0
        names = [str(number) for number in range(len(lengths))] if names is None else names
        assert len(set(names)) == len(names) == len(lengths)
        self._lengths = list(lengths)
        self._seed = seed
        self._name_keys = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in names]
        self._tree = _Tree(weights, names, seed)

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sources and sequences of the samples `first` to `first + count - 1`, each `[count]` int64."""
        if count == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        first_block, offset = divmod(first, BLOCK)
        last_block = (first + count - 1) // BLOCK
        source_NK, number_NK = self._blocks(np.arange(first_block, last_block + 1))
        sources = source_NK.reshape(-1)[offset : offset + count]
        numbers = number_NK.reshape(-1)[offset : offset + count]
        sequences = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            is_source = sources == source
            epochs, indices = np.divmod(numbers[is_source], self._lengths[source])
            keys = make_key(self._seed, _EPOCH_KEY, self._name_keys[source], epochs)
            sequences[is_source] = permute(indices, self._lengths[source], keys)
        return sources, sequences

    def counts(self, total: int) -> np.ndarray:
        """Return how many of the first `total` samples come from each source, `[sources]` int64."""
        full_blocks, rest = divmod(total, BLOCK)
        source_NK, _ = self._blocks(np.array([full_blocks]))
        return self._tree.counts(full_blocks * BLOCK) + np.bincount(source_NK[0, :rest], minlength=len(self._lengths))

    def _blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample of the blocks and its number among the samples of the source, each `[N, K]`.

        The tree deals the sources in a regular order, in which some ranks would read one source only. So the samples of
        each block are shuffled, and the numbers of each source dealt again in the new order. A block of 4:

            dealt by the tree     a0  b0  a1  a2
            shuffled              a1  a0  b0  a2
            renumbered            a0  a1  b0  a2
        """
        regular_NK, number_NK = self._tree.find(blocks[:, None] * BLOCK + np.arange(BLOCK))
        place_NK = permute(np.arange(BLOCK)[None, :], BLOCK, make_key(self._seed, _BLOCK_KEY, blocks)[:, None])
        source_NK = np.take_along_axis(regular_NK, place_NK, axis=1)
        # Stable sorts group the samples of a block by source, in the dealt and in the shuffled order. The k-th sample
        # of a source in the shuffled order gets the number of the k-th in the dealt order.
        dealt_NK = np.argsort(regular_NK, axis=1, kind="stable")
        in_time_NK = np.argsort(source_NK, axis=1, kind="stable")
        shuffled_NK = np.empty_like(number_NK)
        np.put_along_axis(shuffled_NK, in_time_NK, np.take_along_axis(number_NK, dealt_NK, axis=1), axis=1)
        return source_NK, shuffled_NK


class _Tree:
    """Binary tree that deals the samples 0, 1, 2, ... to sources in exact proportion.

    Nodes are numbers: leaves `-1 - source`, inner nodes from 0. At a node with P = 0.75 for its left child and U = 0:

        sample n            0      1     2     3     4
        floor(n * P + U)    0      0     1     2     3      samples below n that went left
        child               right  left  left  left  right  left if floor((n + 1) * P + U) is larger
        number there        0      0     1     2     1      n - floor(n * P + U) on the right
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str], seed: int):
        self._num_sources = len(weights)
        # Equal weights are ordered by name, so that the tree does not depend on the order of the arguments.
        by_weight = sorted(range(len(weights)), key=lambda source: (weights[source], names[source]))
        heap = [(Fraction(weights[source]), number, -1 - source) for number, source in enumerate(by_weight)]
        self._children: list[tuple[int, int]] = []
        shares: list[int] = []
        while len(heap) > 1:
            left, right = heapq.heappop(heap), heapq.heappop(heap)
            shares.append(int((left[0] / (left[0] + right[0])) * (1 << 64)))
            node = len(self._children)
            self._children.append((left[2], right[2]))
            heapq.heappush(heap, (left[0] + right[0], len(weights) + node, node))
        self._root = heap[0][2]
        self._left = np.array([left for left, _ in self._children], dtype=np.int64)
        self._right = np.array([right for _, right in self._children], dtype=np.int64)
        self._shares = np.array(shares, dtype=np.uint64)
        self._offsets = make_key(seed, _TREE_KEY, np.arange(len(shares)))

    def find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample and its number among the samples of the source, each `[...]` int64."""
        numbers = samples.astype(np.int64).reshape(-1)
        nodes = np.full(len(numbers), self._root, dtype=np.int64)
        while (inner := np.flatnonzero(nodes >= 0)).size:
            at, number = nodes[inner], numbers[inner]
            before = _scaled(number, self._shares[at], self._offsets[at])
            is_left = _scaled(number + 1, self._shares[at], self._offsets[at]) > before
            numbers[inner] = np.where(is_left, before, number - before)
            nodes[inner] = np.where(is_left, self._left[at], self._right[at])
        return (-1 - nodes).reshape(samples.shape), numbers.reshape(samples.shape)

    def counts(self, total: int) -> np.ndarray:
        """Return how many of the samples below `total` each source has, `[sources]` int64."""
        found = np.zeros(self._num_sources, dtype=np.int64)
        waiting = [(self._root, total)]
        while waiting:
            node, count = waiting.pop()
            if node < 0:
                found[-1 - node] = count
                continue
            left = int(self._shares[node]) * count + int(self._offsets[node]) >> 64
            waiting += [(self._children[node][0], left), (self._children[node][1], count - left)]
        return found


def _scaled(number: np.ndarray, share: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return floor((number * share + offset) / 2^64) without rounding, `[n]` int64.

    Long multiplication of 64-bit numbers with 32-bit digits gives the upper 64 bits of the product of 128 bits.
    """
    half, low = np.uint64(32), np.uint64((1 << 32) - 1)
    a_high, a_low = number.astype(np.uint64) >> half, number.astype(np.uint64) & low
    b_high, b_low = share >> half, share & low
    lowest = a_low * b_low
    middle = a_high * b_low + (lowest >> half)
    other = a_low * b_high + (middle & low)
    below = (other << half) | (lowest & low)  # the lower 64 bits of the product; adding `offset` may carry
    above = a_high * b_high + (middle >> half) + (other >> half)
    return (above + (below + offset < below)).astype(np.int64)
