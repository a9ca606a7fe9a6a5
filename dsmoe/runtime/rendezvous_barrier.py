"""Rendezvous barrier: wait for all ranks, name the missing ones, and compare what the ranks are about to do.

torch's own rendezvous comes after it, and only counts the missing ranks.
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
    MAX_QUERIED_RANKS,
    Fingerprint,
    Mismatch,
    RankMismatchError,
    combined_exit_code,
    digest,
    explain,
    find_mismatch,
)
from dsmoe.runtime.heartbeat import HeartbeatTimer, call_with_timeout
from dsmoe.runtime.local_device import shared_devices
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.rendezvous import Rendezvous, probe_store
from dsmoe.runtime.reporting_rank import is_host_leader
from dsmoe.runtime.watchdog import STORE_SECONDS
from dsmoe.runtime.world import launcher_has_store

NOTICE_SECONDS = 20.0
"""The time to the first notice of who is waited for; the time to the next one doubles."""
VERDICT_READ_SECONDS = 5.0
"""The time that rank 0, which may have the store, stays for the others to read why all ranks end."""
REACH_SECONDS = 10.0
"""The time in which a rank that cannot start tries to reach rank 0."""
VERDICT_SECONDS = 60.0
"""The time in which that rank then waits for the verdict of rank 0, which waits for the others."""
_ERROR = "error: "


def rendezvous_barrier(
    devices_per_node: int | None, timeout: timedelta, fingerprint: Fingerprint, device: str = ""
) -> None:
    """Wait until all ranks have reached MASTER_ADDR:MASTER_PORT, and compare their fingerprints and devices.

    Args:
        devices_per_node: the ranks per node, by which missing ranks are named by their node; None if unknown.
        timeout: for all ranks to arrive.
        fingerprint: the settings, code and data of this rank, which all ranks must share.
        device: the device that this rank drives (`describe_device`), which no other may drive; empty for none.

    Raises:
        LostRanksError: ranks are missing (the error names them), rank 0 cannot be reached, or its address is unknown.
        RankMismatchError: ranks differ from rank 0, could not start, or drive one device; on every rank.
        torch.distributed.DistNetworkError: rank 0 cannot listen at the port.
    """
    # Three ranks, of which rank 2 has another learning rate. Keys in the store, in order:
    #   rank 0, 1, 2 set "0", "1", "2"   the digest of their fingerprint, and their device
    #   rank 0 sees all three keys, finds that rank 2's digest differs, sets "claims" (its fingerprint) and "all" = [2]
    #   rank 2 is in "all": sets "2/deviation", the entries that differ
    #   rank 0 sets "verdict", the text and the exit code, and raises; ranks 1 and 2 read it, and raise the same
    # If all digests are equal, "all" is [] and there is no verdict; if ranks are missing, it is null, and there is one.
    rendezvous = Rendezvous.from_environment().complete()
    assert rendezvous is not None  # `set_rank_variables` has checked that
    rank, world, address, port = rendezvous
    if rank == 0:
        _await_name(address, timeout)
    if world == 1:
        return
    serves = rank == 0 and not launcher_has_store()  # the next store of this process at that port is the same one
    if not serves:
        _reach(address, port, timeout)

    def connect() -> dist.TCPStore:
        return dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)

    # A store in a stopped process accepts connections, and never answers.
    store = connect() if serves else call_with_timeout(timeout.total_seconds(), connect)
    if store is None:
        raise LostRanksError(f"rank 0 {probe_store() or 'does not answer'} at {address}:{port}, where the ranks meet")
    _stores.append(store)
    keys = [_key(other) for other in range(world)]
    store.set(keys[rank], f"{digest(fingerprint)}\n{device}")
    if rank == 0:
        try:
            _await_all(store, keys, devices_per_node, timeout)
        except LostRanksError as error:
            store.set(_key("all"), "null")
            _announce_verdict(store, str(error), FAILED, sum(store.check([key]) for key in keys) - 1)
            raise
        _compare(store, keys, fingerprint)
        return
    # Rank 0 times out first, and names the missing. If its process is stopped, even the store's timeout never comes.
    seconds = (timeout + timedelta(seconds=2 * STORE_SECONDS)).total_seconds()
    verdict = call_with_timeout(seconds, lambda: [_await_verdict(store, rank, fingerprint)])
    if verdict is None:
        state = probe_store() or "does not answer"
        raise LostRanksError(f"rank 0, which says when all ranks have come, {state} at {address}:{port}")
    if verdict[0] is not None:
        raise RankMismatchError(*verdict[0])


def _await_verdict(store: dist.Store, rank: int, fingerprint: Fingerprint) -> tuple[str, int] | None:
    """Return why all ranks end, with the exit code, or None if all ranks have arrived and agree."""
    store.wait([_key("all")], timedelta(days=1))
    queried = json.loads(store.get(_key("all")))
    if queried == []:
        return None
    if queried and rank in queried:
        first = json.loads(store.get(_key("claims")))
        store.set(_key(f"{rank}/deviation"), json.dumps(asdict(find_mismatch(rank, fingerprint, first))))
    return _read_verdict(store)


def report_to_rank_0(error: str, exit_code: int) -> bool:
    """Tell rank 0, which waits for all, why this rank cannot start; returns whether rank 0 has announced it."""
    rendezvous = Rendezvous.from_environment().complete()
    if rendezvous is None or rendezvous[0] == 0 or rendezvous[1] == 1:
        return False
    rank, world, address, port = rendezvous

    def report() -> bool:
        limit = timedelta(seconds=REACH_SECONDS)
        _reach(address, port, limit)
        store = dist.TCPStore(address, port, world, False, limit, wait_for_workers=False, multi_tenant=True)
        own = Mismatch(rank, socket.gethostname(), {}, error, exit_code)
        store.set(_key(f"{rank}/deviation"), json.dumps(asdict(own)))
        store.set(_key(rank), _ERROR)
        _read_verdict(store)
        return True

    # Fails if rank 0 has ended, or never began: perhaps for the same reason.
    return call_with_timeout(REACH_SECONDS + VERDICT_SECONDS, report) or False


def _compare(store: dist.Store, keys: list[str], fingerprint: Fingerprint) -> None:
    """On rank 0, compare all digests and devices, and query ranks with another digest for their entries."""
    digests, devices = zip(*(value.decode().partition("\n")[::2] for value in store.multi_get(keys)), strict=True)
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    queried = differing[:MAX_QUERIED_RANKS]
    if not queried:
        shared = shared_devices(devices)
        store.set(_key("all"), "null" if shared else "[]")  # null: no rank is queried, and there is a verdict
        if shared:
            _announce_verdict(store, shared, UserError.exit_code, len(keys) - 1)
            raise RankMismatchError(shared)
        return
    store.set(_key("claims"), json.dumps(dict(fingerprint)))
    store.set(_key("all"), json.dumps(queried))
    answers = [_key(f"{rank}/deviation") for rank in queried]
    with suppress(RuntimeError):  # at the timeout, those that have answered are compared
        store.wait(answers, timedelta(seconds=STORE_SECONDS))
    mismatches = [Mismatch(**json.loads(store.get(key))) for key in answers if store.check([key])]
    text = explain(fingerprint, mismatches, len(differing), len(keys))
    exit_code = combined_exit_code(mismatches)
    _announce_verdict(store, text, exit_code, len(keys) - 1)
    raise RankMismatchError(text, exit_code)


def _announce_verdict(store: dist.Store, text: str, exit_code: int, others: int) -> None:
    """Announce why all ranks end, and stay until the others have read it."""
    store.set(_key("verdict"), json.dumps([text, exit_code]))
    deadline = time.monotonic() + VERDICT_READ_SECONDS
    while store.add(_key("read"), 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def _read_verdict(store: dist.Store) -> tuple[str, int]:
    """Return rank 0's verdict: why all ranks end, and the exit code."""
    store.wait([_key("verdict")], timedelta(seconds=VERDICT_SECONDS))
    text, exit_code = json.loads(store.get(_key("verdict")))
    store.add(_key("read"), 1)
    return text, exit_code


def _key(name: object) -> str:
    return f"dsmoe/here/{Rendezvous.from_environment().restart}/{name}"


_stores: list[dist.Store] = []
"""Keeps the stores alive: one ends with its last reference, and others still use it."""


def _await_name(address: str, timeout: timedelta) -> None:
    """Wait until MASTER_ADDR resolves on rank 0's host; torch's store would wait silently."""
    for is_notice_due in _attempts(timeout):
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if is_notice_due:
            print(f"{socket.gethostname()}: waiting until {address} (MASTER_ADDR) is known here: {reason}", flush=True)
    raise LostRanksError(
        f"{socket.gethostname()} has rank 0, and {address} (MASTER_ADDR) is not known there within "
        f"{timeout.total_seconds():.0f} s: {reason}; is that its name or address?"
    )


def _reach(address: str, port: int, timeout: timedelta) -> None:
    """Wait until the port accepts connections; the leader of each host prints notices."""
    prints = is_host_leader()
    for is_notice_due in _attempts(timeout):
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if prints and is_notice_due:
            print(f"{socket.gethostname()}: waiting for rank 0 at {address}:{port}: {reason}", flush=True)
    raise LostRanksError(
        f"rank 0 is not reached at {address}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout.total_seconds():.0f} s: "
        f"{reason}; has the launcher started it, and is that its address?"
    )


def _await_all(store: dist.Store, keys: list[str], devices_per_node: int | None, timeout: timedelta) -> None:
    """On rank 0, wait for the keys of all ranks, and print notices of the missing ones."""
    missing = set(range(len(keys)))
    for is_notice_due in _attempts(timeout):
        missing = {rank for rank in missing if not store.check([keys[rank]])}
        if not missing:
            return
        who = _missing_ranks(sorted(missing), len(keys), devices_per_node)
        if is_notice_due:
            print(f"waiting for {who}", flush=True)
    raise LostRanksError(
        f"{who} have not come within {timeout.total_seconds():.0f} s to {Rendezvous.from_environment().endpoint}, "
        "where the ranks meet; is that address reached from there, and has the launcher started them?"
    )


def _missing_ranks(missing: list[int], world: int, devices_per_node: int | None) -> str:
    nodes = {rank: f"node {rank // devices_per_node}" for rank in missing} if devices_per_node else None
    return f"{len(missing)} of {world} ranks ({ranks_on_hosts(nodes) if nodes else rank_names(missing)}, from 0)"


def _attempts(timeout: timedelta) -> Iterator[bool]:
    """Yield at least once, and then until the timeout, ten times a second; True when a notice is due.

    Notices are due after 20, 60, 140 s and so on.
    """
    waited, next_notice = HeartbeatTimer(2 * STORE_SECONDS), NOTICE_SECONDS
    while waited.seconds <= timeout.total_seconds():
        is_notice_due = waited.seconds > next_notice
        if is_notice_due:
            next_notice = 2 * next_notice + NOTICE_SECONDS
        yield is_notice_due
        time.sleep(0.1)
        waited.update()
