"""Ranks agree on what they exchange before they do, or all learn which of them is the odd one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dsmoe.parallel import Groups
from dsmoe.parallel.shape_check import DisagreementError, agree
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from dsmoe.runtime.watchdog import process_watchdog


def exchange_of(ranks: int, layer: str = "1") -> object:
    return replace(Groups(Topology(1, ranks, expert=ranks)).expert_group(), label=f"layer {layer}")


def agree_on_the_same() -> int:
    group, rank = exchange_of(3), dist.get_rank()
    for tokens in (5 + rank, 9 - rank):  # any number of tokens
        for layer in ("layer 1", "layer 2"):
            agree(replace(group, label=layer), torch.zeros(tokens, 8), 6, "not padded")
            agree(replace(group, label=layer), torch.zeros(tokens, 8), 6, "padded, 4 rows each")
    asked = process_watchdog().store
    process_watchdog().store = None  # what has been agreed on needs nobody
    for _ in range(1000):
        agree(replace(group, label="layer 2"), torch.zeros(1, 8), 6, "not padded")
    process_watchdog().store = asked
    return len(process_watchdog().agreed[0, 1, 2])


def test_ranks_that_agree_are_asked_once_per_shape() -> None:
    assert run_ranks(3, agree_on_the_same) == [4, 4, 4]


def disagree(odd_hidden: int, odd_dtype: torch.dtype, odd_experts: int, odd_padding: str, odd_layer: str) -> str:
    group, rank = exchange_of(3), dist.get_rank()
    if rank == 1:
        group = replace(group, label=odd_layer)
        hidden, dtype, experts, padding = odd_hidden, odd_dtype, odd_experts, odd_padding
    else:
        hidden, dtype, experts, padding = 8, torch.float32, 6, "not padded"
    with pytest.raises(DisagreementError) as caught:
        agree(group, torch.zeros(5, hidden, dtype=dtype), experts, padding)
    return str(caught.value)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ((7, torch.float32, 6, "not padded", "layer 1"), "layer 1, exchange of rows of 7 x torch.float32 to 6"),
        ((8, torch.bfloat16, 6, "not padded", "layer 1"), "layer 1, exchange of rows of 8 x torch.bfloat16 to 6"),
        ((8, torch.float32, 3, "not padded", "layer 1"), "layer 1, exchange of rows of 8 x torch.float32 to 3"),
        ((8, torch.float32, 6, "padded", "layer 1"), "layer 1, exchange of rows of 8 x torch.float32 to 6"),
        ((8, torch.float32, 6, "not padded", "layer 2"), "layer 2, exchange of rows of 8 x torch.float32 to 6"),
    ],
    ids=["hidden size", "dtype", "experts", "padding", "layer"],
)
def test_the_odd_rank_is_named_on_every_rank(odd: tuple[object, ...], told: str) -> None:
    messages = set(run_ranks(3, disagree, *odd))
    (message,) = messages
    _, first, second = message.splitlines()
    assert first.startswith(f"  rank 1: {told}")
    assert second.startswith("  ranks 0, 2: layer 1, exchange of rows of 8 x torch.float32 to 6 experts, not padded")
    assert message.endswith("(5 tokens)")


def meet_a_shape_alone() -> str:
    """Rank 2 brings something new, whereas the others do what they have done before."""
    group, rank = exchange_of(3), dist.get_rank()
    agree(group, torch.zeros(5, 8), 6, "not padded")
    dist.barrier()
    if rank == 2:
        with pytest.raises(DisagreementError) as caught:
            agree(group, torch.zeros(5, 4), 6, "not padded")
        dist.barrier()
        return str(caught.value)
    agree(group, torch.zeros(5, 8), 6, "not padded")
    dist.barrier()  # stands for the exchange, in which these two would wait
    return ""


def test_a_shape_that_is_new_to_one_rank_only_does_not_hang() -> None:
    message = run_ranks(3, meet_a_shape_alone, timeout=60)[2]
    _, first, second = message.splitlines()
    assert first.startswith("  rank 2: layer 1, exchange of rows of 4 x")
    assert second.startswith("  ranks 0-1: layer 1, exchange of rows of 8 x")
