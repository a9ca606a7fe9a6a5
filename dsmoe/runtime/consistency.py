"""Consistency of ranks: compare each rank's fingerprint with rank 0's, and name the differing entries with their ranks.

A fingerprint maps names to values as text, `optimizer.lr` to `0.0003`: settings, code and data. Ranks with different
fingerprints would silently train another model, or wait for each other in collectives that do not match.
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

Fingerprint = Mapping[str, str]
NO_VALUE = "nothing"
MAX_SHOWN_ENTRIES = 20
MAX_SHOWN_CHARACTERS = 120
MAX_QUERIED_RANKS = 64
"""The most ranks that are asked for their differing entries."""


class RankMismatchError(UserError):
    """Ranks that differ from rank 0 in settings, code or data, or cannot start; raised on every rank, with one text."""

    shared_by_all_ranks = True

    def __init__(self, text: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Mismatch:
    """The entries of a rank that differ from rank 0's, or the error because of which it has none."""

    rank: int
    host: str
    entries: Fingerprint
    error: str | None = None
    exit_code: int = UserError.exit_code
    """The exit code of that error: 1 if another try, or another host, may succeed."""


def digest(fingerprint: Fingerprint) -> str:
    """Return the SHA-256 of a fingerprint, in hexadecimal."""
    return hashlib.sha256(json.dumps(sorted(fingerprint.items())).encode()).hexdigest()


def find_mismatch(rank: int, own: Fingerprint, first: Fingerprint) -> Mismatch:
    """Return this rank's entries that differ from `first`, rank 0's."""
    names = [*first, *(name for name in own if name not in first)]
    differing = {name: own.get(name, NO_VALUE) for name in names if own.get(name) != first.get(name)}
    return Mismatch(rank, socket.gethostname(), differing)


def explain(first: Fingerprint, mismatches: Sequence[Mismatch], num_differing: int, world_size: int) -> str:
    """Return one text for all: each differing name with rank 0's value, the other values and their ranks.

    Args:
        first: rank 0's fingerprint.
        mismatches: those of the queried ranks, `MAX_QUERIED_RANKS` at most.
        num_differing: the number of ranks that differ.
        world_size: the number of ranks.
    """
    lines = [f"{_rank_on_host(one)}: {one.error}" for one in mismatches if one.error is not None]
    heading = f"{quantity(num_differing, 'rank')} of {world_size:,} cannot start:"
    for name in dict.fromkeys(name for one in mismatches for name in one.entries):
        values: dict[str, list[Mismatch]] = {}
        for one in mismatches:
            if name in one.entries:
                values.setdefault(one.entries[name], []).append(one)
        others = "; ".join(
            f"{_shortened(value)} on {ranks_on_hosts({one.rank: one.host for one in with_value})}"
            for value, with_value in values.items()
        )
        lines.append(f"{name}: {_shortened(first.get(name, NO_VALUE))} on rank 0; {others}")
    if len(lines) > MAX_SHOWN_ENTRIES:
        lines[MAX_SHOWN_ENTRIES:] = [f"and {len(lines) - MAX_SHOWN_ENTRIES} more"]
    if any(one.entries for one in mismatches):
        heading = (
            f"{quantity(num_differing, 'rank')} of {world_size:,} would not train what rank 0 does; give every host "
            "the same config, data, packages and dsmoe:"
        )
    return "\n  - ".join([heading, *lines])


def combined_exit_code(mismatches: Sequence[Mismatch]) -> int:
    """Return the highest exit code: if one rank's error needs a person (2), another try (1) is pointless."""
    return max((one.exit_code for one in mismatches), default=UserError.exit_code)


def check_all_ranks_agree(fingerprint: Fingerprint) -> None:
    """Compare the fingerprints of all ranks; collective, after the ranks have joined.

    Raises:
        RankMismatchError: on all ranks, if one rank's fingerprint differs from rank 0's.
    """
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest(fingerprint))
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not differing:
        return
    first = [dict(fingerprint)]
    dist.broadcast_object_list(first, src=0)
    gathered: list[Mismatch | None] = [None] * len(digests)
    queried = differing[:MAX_QUERIED_RANKS]
    rank = dist.get_rank()
    dist.all_gather_object(gathered, find_mismatch(rank, fingerprint, first[0]) if rank in queried else None)
    mismatches = [one for one in gathered if one is not None]
    raise RankMismatchError(explain(first[0], mismatches, len(differing), len(digests)))


def _rank_on_host(one: Mismatch) -> str:
    return f"rank {one.rank} on {one.host}"


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:MAX_SHOWN_CHARACTERS]}..."
