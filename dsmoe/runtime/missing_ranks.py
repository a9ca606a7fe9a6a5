"""Wait at the rendezvous for all ranks, name the missing ones, and compare what the ranks are about to do.

torch, which waits next, only knows how many are missing.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.exit_codes import FAILED
from dsmoe.plan.text import rank_names, ranks_on_hosts
from dsmoe.runtime.consistency import (
    ASKED_RANKS,
    Claims,
    Deviation,
    DifferentRanksError,
    deviation,
    digest,
    exit_code_of_all,
    explain,
)
from dsmoe.runtime.heartbeat import Silence, within
from dsmoe.runtime.local_device import shared_devices
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.reporting_rank import is_first_of_host
from dsmoe.runtime.watchdog import STORE_SECONDS, meeting_place
from dsmoe.runtime.world import launcher_has_store

WORD_SECONDS = 20.0
"""After how long a rank first says for whom it waits; each time twice as long passes before it says so again."""
HEARD_SECONDS = 5.0
"""How long rank 0, which may have the store, stays for the others to read why all of them end."""
REACH_SECONDS = 10.0
"""How long a rank that cannot start tries to reach rank 0, to tell it why."""
REPORT_SECONDS = 60.0
"""How long it then waits for rank 0 to say so, which waits for the others."""
_ERROR = "error: "


def call_roll(devices_per_node: int | None, timeout: timedelta, claims: Claims, device: str = "") -> None:
    """Wait until all ranks of the launcher's world have come to MASTER_ADDR:MASTER_PORT, and compare their claims.

    No two of them may drive one device.

    Args:
        devices_per_node: by which ranks are named by their node; None where it is not known.
        timeout: how long.
        claims: what all ranks must have alike.
        device: the one that this rank drives (`describe_device`); empty for none.

    Raises:
        LostRanksError: some have not come, and which; or rank 0 is not reached from here, or not known by its address.
        DifferentRanksError: some have other claims than rank 0, could not start, or drive one device; on every rank.
        torch.distributed.DistNetworkError: rank 0 cannot listen at the port.
    """
    told = Rendezvous.from_environment().complete()
    assert told is not None  # `join_launcher` has seen to it
    rank, world, address, port = told
    if rank == 0:
        _await_name(address, timeout)
    if world == 1:
        return
    serves = rank == 0 and not launcher_has_store()  # this process' next store there is the same one
    if not serves:
        _reach(address, port, timeout)

    def meet() -> dist.TCPStore:
        return dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)

    # A store in a process that is stopped may be connected to, and never answers.
    store = meet() if serves else within(timeout.total_seconds(), meet)
    if store is None:
        raise LostRanksError(f"rank 0 {meeting_place() or 'does not answer'} at {address}:{port}, where the ranks meet")
    _servers.append(store)
    keys = [_key(place) for place in range(world)]
    store.set(keys[rank], f"{digest(claims)}\n{device}")
    if rank == 0:
        try:
            _await_all(store, keys, devices_per_node, timeout)
        except LostRanksError as error:
            store.set(_key("all"), "null")
            _judge(store, str(error), FAILED, sum(store.check([key]) for key in keys) - 1)
            raise
        _compare(store, keys, claims)
        return
    # Rank 0 speaks first, and by name. Where its process is stopped, not even the end of the time is heard of.
    seconds = (timeout + timedelta(seconds=2 * STORE_SECONDS)).total_seconds()
    verdict = within(seconds, lambda: [_learn_verdict(store, rank, claims)])
    if verdict is None:
        state = meeting_place() or "does not answer"
        raise LostRanksError(f"rank 0, which says when all ranks have come, {state} at {address}:{port}")
    if verdict[0] is not None:
        raise DifferentRanksError(*verdict[0])


def _learn_verdict(store: dist.Store, rank: int, claims: Claims) -> tuple[str, int] | None:
    """Hear of rank 0 that all have come and have the same, which is None, or why all ranks end, and the exit code."""
    store.wait([_key("all")], timedelta(days=1))
    asked = json.loads(store.get(_key("all")))
    if asked == []:
        return None
    if asked and rank in asked:
        first = json.loads(store.get(_key("claims")))
        store.set(_key(f"{rank}/deviation"), json.dumps(asdict(deviation(rank, claims, first))))
    return _verdict(store)


def report_at_roll(error: str, exit_code: int) -> bool:
    """Tell rank 0, which waits for all, why this rank cannot start; whether it has said so for all of them."""
    told = Rendezvous.from_environment().complete()
    if told is None or told[0] == 0 or told[1] == 1:
        return False
    rank, world, address, port = told

    def tell() -> bool:
        limit = timedelta(seconds=REACH_SECONDS)
        _reach(address, port, limit)
        store = dist.TCPStore(address, port, world, False, limit, wait_for_workers=False, multi_tenant=True)
        own = Deviation(rank, socket.gethostname(), {}, error, exit_code)
        store.set(_key(f"{rank}/deviation"), json.dumps(asdict(own)))
        store.set(_key(rank), _ERROR)
        _verdict(store)
        return True

    # Fails where rank 0 has ended, or never began: perhaps for the same reason.
    return within(REACH_SECONDS + REPORT_SECONDS, tell) or False


def _compare(store: dist.Store, keys: list[str], claims: Claims) -> None:
    """Let rank 0 look at all digests and devices, and ask some of the ranks with another digest what differs."""
    digests, devices = zip(*(value.decode().partition("\n")[::2] for value in store.multi_get(keys)), strict=True)
    differing = [place for place, there in enumerate(digests) if there != digests[0]]
    asked = differing[:ASKED_RANKS]
    if not asked:
        shared = shared_devices(devices)
        store.set(_key("all"), "null" if shared else "[]")  # null: nobody is asked, and there is a verdict
        if shared:
            _judge(store, shared, UserError.exit_code, len(keys) - 1)
            raise DifferentRanksError(shared)
        return
    store.set(_key("claims"), json.dumps(dict(claims)))
    store.set(_key("all"), json.dumps(asked))
    answers = [_key(f"{place}/deviation") for place in asked]
    with suppress(RuntimeError):  # the others have said what they have
        store.wait(answers, timedelta(seconds=STORE_SECONDS))
    deviations = [Deviation(**json.loads(store.get(key))) for key in answers if store.check([key])]
    text = explain(claims, deviations, len(differing), len(keys))
    exit_code = exit_code_of_all(deviations)
    _judge(store, text, exit_code, len(keys) - 1)
    raise DifferentRanksError(text, exit_code)


def _judge(store: dist.Store, text: str, exit_code: int, others: int) -> None:
    """Say why all ranks end, and stay until the others have heard it."""
    store.set(_key("verdict"), json.dumps([text, exit_code]))
    deadline = time.monotonic() + HEARD_SECONDS
    while store.add(_key("read"), 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def _verdict(store: dist.Store) -> tuple[str, int]:
    """What rank 0 says of all of them, and the exit code."""
    store.wait([_key("verdict")], timedelta(seconds=REPORT_SECONDS))
    text, exit_code = json.loads(store.get(_key("verdict")))
    store.add(_key("read"), 1)
    return text, exit_code


def _key(what: object) -> str:
    return f"dsmoe/here/{Rendezvous.from_environment().restart}/{what}"


_servers: list[dist.Store] = []
"""What ends with its last reference, and must not."""


def _await_name(address: str, timeout: timedelta) -> None:
    """Wait until rank 0's host knows the address by which all call it; torch's store would wait without a word."""
    for is_time_to_speak in _moments(timeout):
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if is_time_to_speak:
            print(f"{socket.gethostname()}: waiting until {address} (MASTER_ADDR) is known here: {reason}", flush=True)
    raise LostRanksError(
        f"{socket.gethostname()} has rank 0, and {address} (MASTER_ADDR) is not known there within "
        f"{timeout.total_seconds():.0f} s: {reason}; is that its name or address?"
    )


def _reach(address: str, port: int, timeout: timedelta) -> None:
    """Wait until somebody listens there; the first rank of each host says that it does."""
    says = is_first_of_host()
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
        f"{who} have not come within {timeout.total_seconds():.0f} s to {Rendezvous.from_environment().place}, "
        "where the ranks meet; is that address reached from there, and has the launcher started them?"
    )


def _absent(missing: list[int], world: int, devices_per_node: int | None) -> str:
    nodes = {place: f"node {place // devices_per_node}" for place in missing} if devices_per_node else None
    return f"{len(missing)} of {world} ranks ({ranks_on_hosts(nodes) if nodes else rank_names(missing)}, from 0)"


def _moments(timeout: timedelta) -> Iterator[bool]:
    """Moments to look again until the time is up, at least one; True when it is time to say so: after 20, 60, 140 s."""
    waited, next_word = Silence(2 * STORE_SECONDS), WORD_SECONDS
    while waited.seconds <= timeout.total_seconds():
        is_time_to_speak = waited.seconds > next_word
        if is_time_to_speak:
            next_word = 2 * next_word + WORD_SECONDS
        yield is_time_to_speak
        time.sleep(0.1)
        waited.look()
