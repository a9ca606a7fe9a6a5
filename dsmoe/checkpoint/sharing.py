"""Which rank writes which box, where several have it: each exactly one, and all about as much."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from dsmoe.parallel.sharding import Box

NamedBox = tuple[str, Box]


def own_share(boxes: Sequence[NamedBox], group: dist.ProcessGroup) -> set[NamedBox]:
    """The boxes that this rank writes, out of those that it has; collective."""
    everyone: list[Sequence[NamedBox]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(boxes), group=group)
    return share(everyone)[dist.get_rank()]


def share(boxes: Sequence[Sequence[NamedBox]]) -> list[set[NamedBox]]:
    """By rank, the boxes that it writes; the same on every rank that asks.

    The largest go first, each to the rank that has the least to write so far among those that have it.
    """
    holders: dict[NamedBox, list[int]] = {}
    for rank, mine in enumerate(boxes):
        for box in mine:
            holders.setdefault(box, []).append(rank)
    elements = [0] * len(boxes)
    shares: list[set[NamedBox]] = [set() for _ in boxes]
    for box, ranks in sorted(holders.items(), key=lambda item: (-item[0][1].size, item[0][0], item[0][1].start)):
        writer = min(ranks, key=lambda rank: (elements[rank], rank))
        elements[writer] += box[1].size
        shares[writer].add(box)
    return shares
