"""What every rank must have alike: compared with rank 0's, and what differs named with its ranks.

A claim is a name and its value as text, `optimizer.lr` and `0.0003`. Ranks with other claims would train another model
without a word, or wait for each other in collectives that do not match.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.plan.text import quantity, ranks_on_hosts

Claims = Mapping[str, str]
ABSENT = "nothing"
SHOWN_CLAIMS = 20
SHOWN_VALUE = 120
ASKED_RANKS = 64
"""The most ranks that are asked for what they have instead."""


class DifferentRanksError(UserError):
    """Ranks that have other settings, code or data than rank 0, or cannot start; on every rank, with one text."""

    shared_by_all_ranks = True

    def __init__(self, text: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Deviation:
    """What a rank has otherwise than rank 0: its value by the claim's name, or why it has nothing to compare."""

    rank: int
    host: str
    claims: Claims
    error: str | None = None
    exit_code: int = UserError.exit_code
    """Of that error: 1 for what may be otherwise at another try, or on another host."""


def digest(claims: Claims) -> str:
    """A short text that is the same for the same claims only."""
    return hashlib.sha256(json.dumps(sorted(claims.items())).encode()).hexdigest()


def deviation(rank: int, own: Claims, first: Claims) -> Deviation:
    """What this rank's claims say otherwise than rank 0's."""
    names = [*first, *(name for name in own if name not in first)]
    differing = {name: own.get(name, ABSENT) for name in names if own.get(name) != first.get(name)}
    return Deviation(rank, socket.gethostname(), differing)


def explain(first: Claims, deviations: Sequence[Deviation], num_differing: int, world_size: int) -> str:
    """One text for people: each name with rank 0's value and the others', and whose they are.

    Args:
        first: rank 0's claims.
        deviations: of the ranks that were asked, `ASKED_RANKS` at most.
        num_differing: how many ranks differ.
        world_size: of how many.
    """
    lines = [f"{_of(one)}: {one.error}" for one in deviations if one.error is not None]
    heading = f"{quantity(num_differing, 'rank')} of {world_size:,} cannot start:"
    for name in dict.fromkeys(name for one in deviations for name in one.claims):
        values: dict[str, list[Deviation]] = {}
        for one in deviations:
            if name in one.claims:
                values.setdefault(one.claims[name], []).append(one)
        others = "; ".join(
            f"{_shown(value)} on {ranks_on_hosts({one.rank: one.host for one in who})}" for value, who in values.items()
        )
        lines.append(f"{name}: {_shown(first.get(name, ABSENT))} on rank 0; {others}")
    if len(lines) > SHOWN_CLAIMS:
        lines[SHOWN_CLAIMS:] = [f"and {len(lines) - SHOWN_CLAIMS} more"]
    if any(one.claims for one in deviations):
        heading = (
            f"{quantity(num_differing, 'rank')} of {world_size:,} would not train what rank 0 does; give every host "
            "the same config, data, packages and dsmoe:"
        )
    return "\n  - ".join([heading, *lines])


def exit_code_of_all(deviations: Sequence[Deviation]) -> int:
    """The highest: where one rank's trouble is a person's to mend, no other try will do."""
    return max((one.exit_code for one in deviations), default=UserError.exit_code)


def check_alike(claims: Claims) -> None:
    """Compare what every rank has; collective, for ranks that have joined.

    Raises:
        DifferentRanksError: on all of them, where any rank has something else than rank 0.
    """
    own = digest(claims)
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, own)
    differing = [rank for rank, there in enumerate(digests) if there != digests[0]]
    if not differing:
        return
    first = [dict(claims)]
    dist.broadcast_object_list(first, src=0)
    gathered: list[Deviation | None] = [None] * len(digests)
    asked = differing[:ASKED_RANKS]
    rank = dist.get_rank()
    dist.all_gather_object(gathered, deviation(rank, claims, first[0]) if rank in asked else None)
    deviations = [one for one in gathered if one is not None]
    raise DifferentRanksError(explain(first[0], deviations, len(differing), len(digests)))


def _of(one: Deviation) -> str:
    return f"rank {one.rank} on {one.host}"


def _shown(value: str) -> str:
    return value if len(value) <= SHOWN_VALUE else f"{value[:SHOWN_VALUE]}..."
