import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.config.errors import UserError
from dsmoe.data.order import BLOCK, Mixture, make_key, permute

UNHURRIED = settings(deadline=None, max_examples=50)  # the machine is shared
SEEDS = st.integers(0, 2**70)
MIXTURES = st.lists(st.tuples(st.integers(1, 3000), st.floats(0.01, 100)), min_size=1, max_size=5)


def mixture(spec: list[tuple[int, float]], seed: int) -> Mixture:
    return Mixture([length for length, _ in spec], [weight for _, weight in spec], seed)


@UNHURRIED
@given(length=st.integers(1, 5000), seed=SEEDS)
def test_permute_is_a_bijection(length: int, seed: int) -> None:
    result = permute(np.arange(length), length, make_key(seed))
    assert np.array_equal(np.sort(result), np.arange(length))


@UNHURRIED
@given(length=st.integers(1, 2**63 - 1), seed=SEEDS, data=st.data())
def test_permute_stays_in_range_and_apart_for_huge_lengths(length: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    result = permute(np.array(indices, dtype=np.uint64), length, make_key(seed))
    assert ((result >= 0) & (result < length)).all()
    assert len(set(result.tolist())) == len(indices)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_short_permutations_all_occur_and_send_every_index_everywhere(length: int) -> None:
    num_keys = 20_000
    permutations = permute(np.arange(length)[None, :], length, make_key(7, np.arange(num_keys))[:, None])
    assert len(np.unique(permutations, axis=0)) == math.factorial(length)
    for index in range(length):
        shares = np.bincount(permutations[:, index], minlength=length) / num_keys
        assert np.abs(shares * length - 1).max() < 0.06


def test_a_permutation_moves_neighbours_apart() -> None:
    result = permute(np.arange(10_000), 10_000, make_key(0))
    assert abs(np.corrcoef(np.arange(10_000), result)[0, 1]) < 0.05
    assert (np.abs(np.diff(result)) == 1).sum() < 20


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = [make_key(*parts)[0] for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**64 - 1, 0), (0, 2**64 - 1)]]
    assert len(set(keys)) == len(keys)
    assert np.array_equal(make_key(5, np.array([1, 2])), np.concatenate([make_key(5, 1), make_key(5, 2)]))


GOLDEN_SOURCES = [0, 1, 1, 0, 1, 0, 0, 0]
GOLDEN_SEQUENCES = [94, 1614, 4495, 97, 3698, 52, 88, 17]


def test_the_order_is_the_same_for_ever() -> None:
    """A run that resumes under a new version must go on with the same data."""
    sources, sequences = Mixture([100, 5000], [1, 3], seed=1234).locate(5000, 8)
    assert sources.tolist() == GOLDEN_SOURCES
    assert sequences.tolist() == GOLDEN_SEQUENCES


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS, first=st.integers(0, 10**9), count=st.integers(0, 3000), data=st.data())
def test_any_start_gives_the_same_samples(
    spec: list[tuple[int, float]], seed: int, first: int, count: int, data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, count))
    sources, sequences = mixture(spec, seed).locate(first, count)
    later_sources, later_sequences = mixture(spec, seed).locate(first + skip, count - skip)
    assert np.array_equal(sources[skip:], later_sources)
    assert np.array_equal(sequences[skip:], later_sequences)
    assert len(sources) == len(sequences) == count


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS)
def test_every_block_has_the_shares_of_the_weights(spec: list[tuple[int, float]], seed: int) -> None:
    weights = np.array([weight for _, weight in spec])
    wanted = BLOCK * weights / weights.sum()
    sources, _ = mixture(spec, seed).locate(0, 4 * BLOCK)
    for block in sources.reshape(4, BLOCK):
        counts = np.bincount(block, minlength=len(spec))
        assert counts.min() >= 1
        if wanted.min() >= 1:
            assert np.abs(counts - wanted).max() < 1 + 1e-9


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS)
def test_no_sequence_comes_back_before_its_epoch_is_over(spec: list[tuple[int, float]], seed: int) -> None:
    sources, sequences = mixture(spec, seed).locate(0, 5 * BLOCK)
    for source, (length, _) in enumerate(spec):
        mine = sequences[sources == source]
        for start in range(0, len(mine), length):
            epoch = mine[start : start + length]
            assert len(np.unique(epoch)) == len(epoch)
            assert epoch.max() < length


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS, total=st.integers(0, 5000))
def test_counts_are_those_of_the_samples(spec: list[tuple[int, float]], seed: int, total: int) -> None:
    sources, _ = mixture(spec, seed).locate(0, total)
    assert np.array_equal(mixture(spec, seed).counts(total), np.bincount(sources, minlength=len(spec)))


def test_epochs_and_blocks_differ() -> None:
    sources, sequences = Mixture([BLOCK, BLOCK], [1, 1], seed=0).locate(0, 4 * BLOCK)
    assert not np.array_equal(sources[:BLOCK], sources[BLOCK : 2 * BLOCK])
    first = sequences[sources == 0]
    assert not np.array_equal(first[:BLOCK], first[BLOCK:])
    assert not np.array_equal(first[:BLOCK], sequences[sources == 1][:BLOCK])


def test_a_negligible_source_still_gets_one_sample_per_block() -> None:
    sources, _ = Mixture([10, 10, 10], [1e-9, 1, 1e-9], seed=0).locate(0, BLOCK)
    assert np.bincount(sources).tolist() == [1, BLOCK - 2, 1]


def test_too_many_sources() -> None:
    with pytest.raises(UserError, match=r"1025 sources, at most 1024"):
        Mixture([1] * 1025, [1.0] * 1025, seed=0)
