"""One rank of each host prints, where ranks cannot ask each other: they have not met, or their store has gone."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Mapping

from dsmoe.launch.launchers import first_rank_known, is_alone, name_of_run
from dsmoe.launch.rendezvous import Rendezvous

LINGER_SECONDS = 5.0
"""How long a rank that has printed for its host stays: those that come later would print the same."""

_held: list[socket.socket] = []
"""What makes this process the one that prints for its host, until it ends."""


def speaks_for_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first rank of its run on this host that asks, since the ranks that asked before it ended.

    An abstract Unix socket is bound, which the kernel frees when its process ends, however that is. Ranks in containers
    with a network of their own are on hosts of their own here. Where there are no such sockets, the host's first rank
    speaks.
    """
    if _held:
        return True
    if sys.platform != "linux":
        return Rendezvous.from_environment(environment).is_first_of_host
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
        who = "" if rank == "0" else f"[rank {rank} on {socket.gethostname()}] "
        print(f"{who}{text}", file=sys.stderr, flush=True)
    time.sleep(LINGER_SECONDS)  # also where another prints: launchers end all ranks as soon as one has ended
