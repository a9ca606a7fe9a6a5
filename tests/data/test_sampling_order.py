import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.data.sampling_order import BLOCK, ORDER_VERSION, Mixture, make_key, permute

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


GOLDEN_SOURCES = [0, 0, 1, 1, 0, 1, 0, 1]
GOLDEN_SEQUENCES = [99, 74, 3824, 2945, 10, 3250, 71, 4252]


def test_the_order_is_the_same_for_ever() -> None:
    """The order is that of earlier versions, so that runs can resume; a change needs a new `ORDER_VERSION`."""
    assert ORDER_VERSION == 2
    sources, sequences = Mixture([100, 5000], [2, 3], seed=1234, names=["b", "a"]).locate(5000, 8)
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


MANY = st.lists(st.floats(-6, 0).map(lambda exponent: 10**exponent), min_size=1, max_size=50)


@UNHURRIED
@given(weights=MANY, seed=SEEDS, blocks=st.integers(1, 10**9))
def test_every_prefix_has_the_shares_of_the_weights(weights: list[float], seed: int, blocks: int) -> None:
    """For any weights, counts are less than 4 samples off after whole blocks, and a block's share in between."""
    found = Mixture([7] * len(weights), weights, seed)
    shares = np.array(weights) / math.fsum(weights)
    assert np.abs(found.counts(blocks * BLOCK) - blocks * BLOCK * shares).max() < 4
    sources, _ = found.locate(0, 20 * BLOCK)
    so_far = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, len(sources) + 1)[:, None] * shares
    assert (np.abs(so_far - wanted) < 4 + BLOCK * shares).all()


def test_light_sources_have_their_weight_and_no_more() -> None:
    """Version 1 rounded shares to 1/1024, and gave 39 sources of 0.0005 twice their share of the samples."""
    weights = [1.0, *[0.0005] * 38, 1e-6]
    counts = Mixture([1000] * 40, weights, seed=0).counts(10_000_000)
    wanted = 10_000_000 * np.array(weights) / math.fsum(weights)
    assert np.abs(counts - wanted).max() < 4
    assert counts[-1] in range(6, 14)


def test_a_light_source_comes_at_any_place_of_its_period() -> None:
    """A rare source is not always at the beginning or the end: short runs read it with the right probability."""
    came = sum(Mixture([9, 9], [1.0, 0.001], seed).counts(250)[1] for seed in range(400))
    assert 70 < came < 130  # 100 expected


@UNHURRIED
@given(weights=MANY, seed=SEEDS, order=st.randoms())
def test_the_sources_may_come_in_any_order(weights: list[float], seed: int, order: random.Random) -> None:
    names = [f"s{number}" for number in range(len(weights))]
    places = list(range(len(weights)))
    order.shuffle(places)
    one = Mixture([100] * len(weights), weights, seed, names)
    other = Mixture([100] * len(weights), [weights[i] for i in places], seed, [names[i] for i in places])
    (sources, sequences), (shuffled, same_sequences) = one.locate(1000, 500), other.locate(1000, 500)
    assert [names[s] for s in sources] == [names[places[s]] for s in shuffled]
    assert np.array_equal(sequences, same_sequences)


def test_ranks_do_not_read_one_source_each() -> None:
    """Dealt in turn without a shuffle, two equal sources would get the even and the odd samples."""
    sources, _ = Mixture([1000, 1000], [1, 1], seed=0).locate(0, 64 * BLOCK)
    assert 0.45 < sources[::2].mean() < 0.55


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS)
def test_no_sequence_comes_back_before_its_epoch_is_over(spec: list[tuple[int, float]], seed: int) -> None:
    sources, sequences = mixture(spec, seed).locate(0, 80 * BLOCK)
    for source, (length, _) in enumerate(spec):
        in_order = sequences[sources == source]
        for start in range(0, len(in_order), length):
            epoch = in_order[start : start + length]
            assert len(np.unique(epoch)) == len(epoch)
            assert epoch.max() < length


@UNHURRIED
@given(spec=MIXTURES, seed=SEEDS, total=st.integers(0, 5000))
def test_counts_are_those_of_the_samples(spec: list[tuple[int, float]], seed: int, total: int) -> None:
    sources, _ = mixture(spec, seed).locate(0, total)
    assert np.array_equal(mixture(spec, seed).counts(total), np.bincount(sources, minlength=len(spec)))


def test_epochs_and_blocks_differ() -> None:
    sources, sequences = Mixture([1024, 1024], [1, 1], seed=0).locate(0, 4096)
    assert not np.array_equal(sources[:1024], sources[1024:2048])
    first = sequences[sources == 0]
    assert not np.array_equal(first[:1024], first[1024:])
    assert not np.array_equal(first[:1024], sequences[sources == 1][:1024])
