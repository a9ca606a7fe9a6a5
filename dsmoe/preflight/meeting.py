"""Barriers over the rendezvous store, at which rank 0 reads all reports and decides for all ranks.

Not collectives: a rank whose device has failed can still say so, and one that says nothing is known by its number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsmoe.preflight.results import RankReport
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.waiting import run_watched
from dsmoe.runtime.watchdog import STORE_SECONDS, process_watchdog

Answer = dict[str, Any]


def meet(name: str, report: RankReport, decide: Callable[[Sequence[RankReport]], Answer], timeout: timedelta) -> Answer:
    """Send this rank's `report` to rank 0, which decides on the reports of all ranks; return the decision.

    Raises:
        LostRanksError: ranks do not come within `timeout`.
    """
    store, prefix = process_watchdog().store, f"dsmoe/preflight/{name}"
    keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[report.rank], json.dumps(report.json()))
    if report.rank == 0:
        _wait(store, keys, timeout)
        answer = decide([RankReport.from_json(json.loads(store.get(key))) for key in keys])
        store.set(f"{prefix}/answer", json.dumps(answer))
        return answer
    _wait(store, [f"{prefix}/answer"], timeout + timedelta(seconds=STORE_SECONDS))
    decision: Answer = json.loads(store.get(f"{prefix}/answer"))
    return decision


def part() -> None:
    """Wait on rank 0, which may hold the store, for the others to end."""
    store, world = process_watchdog().store, dist.get_world_size()
    store.add("dsmoe/preflight/parted", 1)
    deadline = time.monotonic() + STORE_SECONDS
    if dist.get_rank() == 0:
        while store.add("dsmoe/preflight/parted", 0) < world and time.monotonic() < deadline:
            time.sleep(0.02)


def _wait(store: dist.Store, keys: Sequence[str], timeout: timedelta) -> None:
    try:
        run_watched(lambda: store.wait(list(keys), timeout))  # which, where rank 0 stands still, waits for ever
    except LostRanksError:
        raise
    except RuntimeError as error:
        missing = [key.rsplit("/", 1)[1] for key in keys if not store.check([key])]
        raise LostRanksError(f"no word of {', '.join(missing[:8])} within {timeout.total_seconds():.0f} s") from error
