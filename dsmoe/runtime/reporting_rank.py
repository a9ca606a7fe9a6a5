"""Which process prints what several have to say: one for the whole job, one for its host, or each for itself.

Where ranks cannot ask each other: they have not met, or their store has gone. Else `Watch.speaker` says which of them
has failed first.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Mapping

from dsmoe.runtime.launchers import first_rank_known, is_alone, name_of_run
from dsmoe.runtime.rendezvous import Rendezvous

LINGER_SECONDS = 5.0
"""How long a rank that has printed for its host stays: those that come later would print the same."""

_held: list[socket.socket] = []
"""What makes this process the one that prints for its host, until it ends."""


def speaks_for_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what all ranks have to say, as far as is known before they have met."""
    return first_rank_known(environment) == "0"


def is_first_of_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what its host's ranks have to say, where all of them are sure to be there."""
    return Rendezvous.from_environment(environment).is_first_of_host


def speaks_of_jobs(rank: int) -> bool:
    """Whether a rank says how far a job of all ranks is: rank 0, or where it does not rank 1 and each host's first."""
    return rank < 2 or Rendezvous.from_environment().local_rank == 0


def speaks_for_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first rank of its run on this host that asks, since the ranks that asked before it ended.

    An abstract Unix socket is bound, which the kernel frees when its process ends, however that is. Ranks in containers
    with a network of their own are on hosts of their own here. Where there are no such sockets, the host's first rank
    speaks.
    """
    if _held:
        return True
    if sys.platform != "linux":
        return is_first_of_host(environment)
    run = f"{os.getuid()}/{name_of_run(environment)}"
    name = hashlib.sha256(run.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(f"\0dsmoe/speaker/{name}")
    except OSError:
        bound.close()
        return False
    _held.append(bound)
    return True


def print_for_host(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print an error on standard error, once for all ranks of this host that print now; then wait for later ones.

    A process of which no launcher says that there are others prints at once, and does not wait.
    """
    if is_alone(environment):
        print(text, file=sys.stderr, flush=True)
        return
    if speaks_for_host(environment):
        rank = first_rank_known(environment)
        print(text if rank == "0" else signed(rank, text), file=sys.stderr, flush=True)
    time.sleep(LINGER_SECONDS)  # also where another prints: launchers end all ranks as soon as one has ended


def signed(rank: int | str | None, text: str) -> str:
    """What a rank says that does not speak for all of them."""
    return f"[rank {rank} on {socket.gethostname()}] {text}"
