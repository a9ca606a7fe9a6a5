"""Where the ranks wait for each other, and rank 0 hears all and tells them what to do: the store that they meet at.

Not collectives: a rank whose device has failed can still say so, and one that says nothing is known by its number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsmoe.parallel.watch import STORE_SECONDS, LostRanksError, process_watch
from dsmoe.plan import Topology
from dsmoe.preflight.results import RankReport

Answer = dict[str, Any]

WORD_SECONDS = 20.0
"""How often rank 0 says for whom it waits."""


def meet(name: str, mine: RankReport, decide: Callable[[Sequence[RankReport]], Answer], timeout: timedelta) -> Answer:
    """Bring `mine` to rank 0, which decides on the reports of all ranks; returns what it has decided.

    Raises:
        LostRanksError: ranks do not come within `timeout`.
    """
    store, prefix = process_watch().store, f"dsmoe/preflight/{name}"
    keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[mine.rank], json.dumps(mine.json()))
    if mine.rank == 0:
        _wait(store, keys, timeout)
        answer = decide([RankReport.from_json(json.loads(store.get(key))) for key in keys])
        store.set(f"{prefix}/answer", json.dumps(answer))
        return answer
    _wait(store, [f"{prefix}/answer"], timeout + timedelta(seconds=STORE_SECONDS))
    heard: Answer = json.loads(store.get(f"{prefix}/answer"))
    return heard


def call_roll(topology: Topology, timeout: timedelta) -> None:
    """Wait until every rank has come to the store; torch, which waits next, only knows how many are missing.

    Raises:
        LostRanksError: some have not, and which.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # As torch decides it; under torchrun the agent has the store. This process' next store there is the same one.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            return  # joining says so
        raise
    _servers.append(store)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"dsmoe/here/{attempt}/{place}" for place in range(world)]
    store.set(keys[rank], "")
    if rank == 0:
        _await_all(store, keys, topology, timeout)
        store.set(f"dsmoe/here/{attempt}/all", "")
    else:
        store.wait([f"dsmoe/here/{attempt}/all"], timeout + timedelta(seconds=STORE_SECONDS))


_servers: list[dist.Store] = []
"""What ends with its last reference, and must not."""


def _await_all(store: dist.Store, keys: Sequence[str], topology: Topology, timeout: timedelta) -> None:
    """Wait on rank 0, which says now and then for whom."""
    deadline, next_word = time.monotonic() + timeout.total_seconds(), time.monotonic() + WORD_SECONDS
    missing = set(range(len(keys)))
    while missing := {place for place in missing if not store.check([keys[place]])}:
        nodes = sorted({place // topology.devices_per_node for place in missing})
        who = f"{len(missing)} of {len(keys)} ranks, of node {', '.join(map(str, nodes[:8]))} (from 0)"
        if time.monotonic() > deadline:
            raise LostRanksError(
                f"{who}, have not come within {timeout.total_seconds():.0f} s to {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, where the ranks meet; is that address reached from there, and has the "
                f"launcher started them?"
            )
        if time.monotonic() > next_word:
            next_word += WORD_SECONDS
            print(f"waiting for {who}", flush=True)
        time.sleep(0.1)


def part() -> None:
    """Let rank 0, which may hold the store, end last."""
    store, world = process_watch().store, dist.get_world_size()
    store.add("dsmoe/preflight/parted", 1)
    deadline = time.monotonic() + STORE_SECONDS
    if dist.get_rank() == 0:
        while store.add("dsmoe/preflight/parted", 0) < world and time.monotonic() < deadline:
            time.sleep(0.02)


def _wait(store: dist.Store, keys: Sequence[str], timeout: timedelta) -> None:
    try:
        store.wait(list(keys), timeout)
    except RuntimeError as error:
        missing = [key.rsplit("/", 1)[1] for key in keys if not store.check([key])]
        raise LostRanksError(f"no word of {', '.join(missing[:8])} within {timeout.total_seconds():.0f} s") from error
