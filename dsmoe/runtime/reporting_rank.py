"""Reporting rank: the one process that prints a message of several, chosen before the ranks can ask each other.

That is before they have joined, and after their store has gone. In between, the first failed rank reports
(`Watchdog.announce_failure`).
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Mapping

from dsmoe.runtime.launchers import is_single_process, rank_from_variables, run_key
from dsmoe.runtime.rendezvous import Rendezvous

LINGER_SECONDS = 5.0
"""The time that a rank that has printed for its host stays alive: later ranks would print the same."""

_bound: list[socket.socket] = []
"""The socket by which this process prints for its host, until it ends."""


def reports_for_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints for all ranks: rank 0, by the launcher's variables."""
    return rank_from_variables(environment) == "0"


def is_host_leader(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is the first rank of its host, which prints for the host while all its ranks are alive."""
    return Rendezvous.from_environment(environment).is_host_leader


def logs_progress(rank: int) -> bool:
    """Return whether a rank logs the progress of jobs: rank 0, or if it does not rank 1 and each host's leader."""
    return rank < 2 or Rendezvous.from_environment().local_rank == 0


def reports_for_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints for its host: the first living rank of the run there that has called this.

    It binds an abstract Unix socket, which the kernel frees when the process ends, however that is. A container with a
    network of its own counts as a host. Without abstract sockets (not Linux), the host's leader prints.
    """
    # Ranks 4 to 7 share a host, and rank 0 is gone. Rank 6 is the first to call this and binds the socket: True. The
    # others find it bound: False. Rank 6 prints and stays alive for LINGER_SECONDS, so that a rank which calls this a
    # moment later still finds the socket bound.
    if _bound:
        return True
    if sys.platform != "linux":
        return is_host_leader(environment)
    run = f"{os.getuid()}/{run_key(environment)}"
    name = hashlib.sha256(run.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0dsmoe/speaker/{name}")
    except OSError:
        lock.close()
        return False
    _bound.append(lock)
    return True


def print_once_per_host(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print an error on standard error, once for all ranks of this host, and linger for `LINGER_SECONDS`.

    A process that is alone, by the launcher's variables, prints and does not linger.
    """
    if is_single_process(environment):
        print(text, file=sys.stderr, flush=True)
        return
    if reports_for_host(environment):
        rank = rank_from_variables(environment)
        print(text if rank == "0" else signed(rank, text), file=sys.stderr, flush=True)
    time.sleep(LINGER_SECONDS)  # also if another prints: launchers end all ranks as soon as one has ended


def signed(rank: int | str | None, text: str) -> str:
    """Return `text` with the name of a rank that does not print for all of them."""
    return f"[rank {rank} on {socket.gethostname()}] {text}"
