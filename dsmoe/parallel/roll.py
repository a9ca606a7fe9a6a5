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
    says = os.environ.get("LOCAL_RANK", "0") == "0"
    for is_time_to_speak in _moments(timeout):
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if says and is_time_to_speak:
            print(f"{socket.gethostname()}: waiting for rank 0 at {address}:{port}: {reason}", flush=True)
    raise LostRanksError(
        f"rank 0 is not reached at {address}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout.total_seconds():.0f} s: "
        f"{reason}; has the launcher started it, and is that its address?"
    )


def _await_all(store: dist.Store, keys: list[str], devices_per_node: int | None, timeout: timedelta) -> None:
    """Wait on rank 0, which says now and then for whom."""
    missing = set(range(len(keys)))
    for is_time_to_speak in _moments(timeout):
        missing = {place for place in missing if not store.check([keys[place]])}
        if not missing:
            return
        who = _absent(sorted(missing), len(keys), devices_per_node)
        if is_time_to_speak:
            print(f"waiting for {who}", flush=True)
    raise LostRanksError(
        f"{who}, have not come within {timeout.total_seconds():.0f} s to {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']}, where the ranks meet; is that address reached from there, and has the launcher "
        f"started them?"
    )


def _absent(missing: list[int], world: int, devices_per_node: int | None) -> str:
    kind, places = "rank", missing
    if devices_per_node is not None:
        kind, places = "of node", sorted({place // devices_per_node for place in missing})
    more = "" if len(places) <= SHOWN_NODES else ", ..."
    return f"{len(missing)} of {world} ranks, {kind} {', '.join(map(str, places[:SHOWN_NODES]))}{more} (from 0)"


def _moments(timeout: timedelta) -> Iterator[bool]:
    """Moments to look again until the time is up, at least one; True when it is time to say so: after 20, 60, 140 s."""
    begun, next_word = time.monotonic(), WORD_SECONDS
    waited = 0.0
    while waited <= timeout.total_seconds():
        is_time_to_speak = waited > next_word
        if is_time_to_speak:
            next_word = 2 * next_word + WORD_SECONDS
        yield is_time_to_speak
        time.sleep(0.1)
        waited = time.monotonic() - begun
