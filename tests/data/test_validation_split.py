import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.data.validation_split import choose_validation, cut_single_document, hash_limit

UNHURRIED = settings(deadline=None)  # the machine is shared


@UNHURRIED
@given(
    documents=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 10**6)), min_size=2, max_size=50),
    fraction=st.floats(0.01, 0.99),
)
def test_validation_is_neither_empty_nor_everything(documents: list[tuple[int, int]], fraction: float) -> None:
    hashes = np.array([hash_ for hash_, _ in documents], dtype=np.uint64)
    sizes = np.array([size for _, size in documents])
    chosen = choose_validation(hashes, sizes, fraction)
    if len(np.unique(hashes)) > 1:
        assert 0 < chosen.sum() < len(documents)
    assert sizes[chosen].sum() <= (1 + fraction) / 2 * sizes.sum() + 1e-6
    assert not set(hashes[chosen].tolist()) & set(hashes[~chosen].tolist())


def test_smallest_hashes_until_the_fraction_is_reached() -> None:
    hashes = np.array([50, 10, 40, 20, 30], dtype=np.uint64)
    chosen = choose_validation(hashes, np.full(5, 100), 0.3)
    assert chosen.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_large_sources_hold_out_by_the_hash_alone(fraction: float) -> None:
    """Two sources then hold out the same of their common documents."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 20_000, dtype=np.uint64)
    chosen = choose_validation(hashes, generator.integers(50, 500, 20_000), fraction)
    assert np.array_equal(chosen, hashes < hash_limit(fraction))
    assert abs(chosen.mean() - fraction) < 0.1 * min(fraction, 1 - fraction)


def test_a_text_that_is_most_of_the_corpus_stays_in_training() -> None:
    chosen = choose_validation(np.array([1, 2, 3], dtype=np.uint64), np.array([10_000, 10, 10]), 0.05)
    assert chosen.tolist() == [False, True, True]


@UNHURRIED
@given(text=st.text(min_size=1), fraction=st.floats(0.01, 0.99))
def test_cutting_loses_nothing(text: str, fraction: float) -> None:
    head, tail = cut_single_document(text, fraction)
    assert head + tail == text
    assert tail


@pytest.mark.parametrize(
    ("text", "fraction", "tail"),
    [
        ("one\ntwo\nthree four\n", 0.65, "two\nthree four\n"),
        ("one two three", 0.3, "three"),
        ("ääääää", 0.25, "ää"),  # 3 of 12 bytes would be inside a character
    ],
)
def test_cutting_at_a_line_a_space_or_a_character(text: str, fraction: float, tail: str) -> None:
    assert cut_single_document(text, fraction)[1] == tail
