"""How the planner writes numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dsmoe.plan.text import first_and_last, quantity, rank_names, ranks_on_hosts, readable_count, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 K"),
        (999_949, "999.9 K"),
        (999_951, "1.0 M"),
        (1_228_800, "1.2 M"),
        (46_702_792_704, "46.7 B"),
        (15_000_000_000_000, "15.0 T"),
        (2_500_000_000_000_000, "2,500.0 T"),
    ],
)
def test_readable_count(count: int, text: str) -> None:
    assert readable_count(count) == text


def test_quantity_is_plural_unless_one() -> None:
    assert [quantity(count, "step") for count in (0, 1, 4096)] == ["0 steps", "1 step", "4,096 steps"]


@pytest.mark.parametrize(
    ("items", "text"),
    [
        (range(0), ""),
        (range(4), "0 1 2 3"),
        (range(5), "0 1 2 ... 4"),
        (range(0, 64, 8), "0 8 16 ... 56"),
        (["a", "b"], "a b"),
    ],
)
def test_first_and_last(items: Sequence[object], text: str) -> None:
    assert " ".join(first_and_last(items)) == text


def test_table() -> None:
    rows = [("axis", "size", "first"), ("tensor", "16,384", "0"), ("data", "1", "0 1 2")]
    assert table(rows, "<><") == ["axis      size  first", "tensor  16,384  0", "data         1  0 1 2"]


def test_ranks_are_named_with_their_hosts_in_a_line_that_people_read() -> None:
    assert rank_names([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert rank_names([7]) == "rank 7"
    assert rank_names(range(0, 4000, 2)) == "2,000 ranks from 0 to 3998"
    assert ranks_on_hosts({5: "host1", 0: "host0", 1: "host0"}) == "ranks 0-1, 5 on host0, host1"
    many = ranks_on_hosts({rank: f"host{rank // 8}" for rank in range(0, 8192, 2)})
    assert many == "4,096 ranks from 0 to 8190 on host0, host1, host2 and 1,021 more hosts"
