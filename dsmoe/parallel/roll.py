"""Whether every rank has come to where the ranks meet; torch, which waits next, only knows how many are missing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from dsmoe.parallel.watch import STORE_SECONDS, LostRanksError

WORD_SECONDS = 20.0
"""After how long a rank first says for whom it waits; each time twice as long passes before it says so again."""
SHOWN_NODES = 8


def call_roll(devices_per_node: int | None, timeout: timedelta) -> None:
    """Wait until all ranks of the launcher's world have come to MASTER_ADDR:MASTER_PORT.

    Args:
        devices_per_node: by which ranks are named by their node; None where it is not known.
        timeout: how long.

    Raises:
        LostRanksError: some have not come, and which; or rank 0 is not reached from here.
        torch.distributed.DistNetworkError: rank 0 cannot listen at the port.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # As torch decides it; under torchrun the agent has the store. This process' next store there is the same one.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _reach(address, port, timeout)
    store = dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)
    _servers.append(store)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    everybody = f"dsmoe/here/{attempt}/all"
    keys = [f"dsmoe/here/{attempt}/{place}" for place in range(world)]
    store.set(keys[rank], "")
    if rank == 0:
        _await_all(store, keys, devices_per_node, timeout)
        store.set(everybody, "")
        return
    try:
        store.wait([everybody], timeout + timedelta(seconds=STORE_SECONDS))  # rank 0 speaks first, and by name
    except RuntimeError as error:
        raise LostRanksError(f"rank 0, at {address}:{port}, does not say that all ranks have come") from error


_servers: list[dist.Store] = []
"""What ends with its last reference, and must not."""


def _reach(address: str, port: int, timeout: timedelta) -> None:
    """Wait until somebody listens there; the first rank of each host says that it does."""
    words, says = _word_times(), os.environ.get("LOCAL_RANK", "0") == "0"
    next_word, deadline = next(words), time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise LostRanksError(
                f"rank 0 is not reached at {address}:{port} (MASTER_ADDR, MASTER_PORT) within "
                f"{timeout.total_seconds():.0f} s: {reason}; has the launcher started it, and is that its address?"
            )
        if says and time.monotonic() > next_word:
            next_word = next(words)
            print(f"{socket.gethostname()}: waiting for rank 0 at {address}:{port}: {reason}", flush=True)
        time.sleep(0.2)


def _await_all(store: dist.Store, keys: list[str], devices_per_node: int | None, timeout: timedelta) -> None:
    """Wait on rank 0, which says now and then for whom."""
    words = _word_times()
    next_word, deadline = next(words), time.monotonic() + timeout.total_seconds()
    missing = set(range(len(keys)))
    while missing := {place for place in missing if not store.check([keys[place]])}:
        who = _absent(sorted(missing), len(keys), devices_per_node)
        if time.monotonic() > deadline:
            raise LostRanksError(
                f"{who}, have not come within {timeout.total_seconds():.0f} s to {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, where the ranks meet; is that address reached from there, and has the "
                f"launcher started them?"
            )
        if time.monotonic() > next_word:
            next_word = next(words)
            print(f"waiting for {who}", flush=True)
        time.sleep(0.1)


def _absent(missing: list[int], world: int, devices_per_node: int | None) -> str:
    kind, places = "rank", missing
    if devices_per_node is not None:
        kind, places = "of node", sorted({place // devices_per_node for place in missing})
    more = "" if len(places) <= SHOWN_NODES else ", ..."
    return f"{len(missing)} of {world} ranks, {kind} {', '.join(map(str, places[:SHOWN_NODES]))}{more} (from 0)"


def _word_times() -> Iterator[float]:
    """When to speak: after 20 s, 60 s, 140 s, ..."""
    after, begun = WORD_SECONDS, time.monotonic()
    while True:
        yield begun + after
        after = 2 * after + WORD_SECONDS
