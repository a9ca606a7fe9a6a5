import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from dsmoe.data import PreparedSource, bigram_baseline, bigram_nats, prepare
from dsmoe.data.checksummed_files import write_file
from tests.data.conftest import MakeConfig

VOCAB = 7


def write_source(folder: Path, train: np.ndarray) -> PreparedSource:
    write_file(folder / "train.bin", train.astype("<u2").tobytes())
    return PreparedSource("a", 1.0, folder, np.dtype("<u2"), len(train), 0, 0, 0, max_token=2**16 - 1)


def brute_force(train: list[int], sequences: list[list[int]]) -> float:
    """Compute the same model one token at a time and with explicit loops."""
    held_out = math.ceil(0.05 * len(train))
    fitted, rest = train[:-held_out], train[-held_out - 1 :]

    def terms(previous: int, token: int) -> list[float]:
        unigram = fitted.count(token) / len(fitted)
        follow = [b for a, b in itertools.pairwise(fitted) if a == previous]
        return [follow.count(token) / len(follow) if follow else unigram, unigram, 1 / VOCAB]

    weights = [1 / 3] * 3
    for _ in range(10):
        gained = [0.0] * 3
        for a, b in itertools.pairwise(rest):
            shares = [w * p for w, p in zip(weights, terms(a, b), strict=True)]
            gained = [g + share / sum(shares) for g, share in zip(gained, shares, strict=True)]
        weights = [g / (len(rest) - 1) for g in gained]
    nats = 0.0
    for sequence in sequences:
        for a, b in itertools.pairwise(sequence):
            nats -= math.log(sum(w * p for w, p in zip(weights, terms(a, b), strict=True)))
    return nats


@pytest.mark.parametrize("length", [20, 300])
def test_against_brute_force(length: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(length)
    train = np.cumsum(generator.integers(0, 3, length)) % (VOCAB - 1)
    sequences = generator.integers(0, VOCAB, (5, 9))  # with a token that training never saw
    source = write_source(tmp_path, train)
    expected = brute_force(train.tolist(), sequences.tolist())
    assert bigram_nats(source, VOCAB, sequences) == pytest.approx(expected, rel=1e-9)


def test_probabilities_sum_to_one() -> None:
    model = bigram_baseline._Bigram(np.array([0, 1, 2, 0, 1, 3]), VOCAB)
    model.fit_weights(np.array([0, 1, 2, 2, 5]))
    for previous in range(VOCAB):
        nats = [model.nats(np.array([previous, token])) for token in range(VOCAB)]
        assert sum(math.exp(-n) for n in nats) == pytest.approx(1.0)


def test_a_cycle_is_learnt_almost_perfectly(tmp_path: Path) -> None:
    source = write_source(tmp_path, np.arange(5000) % 5)
    assert bigram_nats(source, VOCAB, np.arange(500).reshape(1, -1) % 5) < 0.02 * 499


def test_lower_than_the_unigram_entropy_of_shakespeare(make_config: MakeConfig) -> None:
    (source,) = prepare(make_config({"name": "shakespeare", "path": "builtin:shakespeare"}))
    shares = np.bincount(source.validation, minlength=257) / source.validation_tokens
    unigram_bits = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() / source.validation_bytes_per_token
    whole = np.asarray(source.validation)[None]
    bits = bigram_nats(source, 257, whole) / math.log(2) / source.validation_bytes
    assert 3.0 < bits < unigram_bits - 1.0
    assert bits == pytest.approx(3.662, abs=0.01)
