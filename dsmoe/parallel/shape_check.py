"""Agreement of a group's ranks on a shape before they exchange it for the first time; a difference stops all of them.

An exchange with different shapes on different ranks does not fail: it waits, or moves bytes to the wrong places. So a
rank writes a (layer, shape) that it has not exchanged yet into the store and waits until the rest of its group has
written the same. Shapes that were agreed on cost a set lookup and no communication.

A rank to which a shape is new when it is not to others cannot wait for their entries: they are in the exchange already,
as their notes in `dsmoe.runtime.watchdog` show.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import json
import time

import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.parallel.groups import ExpertGroup
from dsmoe.plan.text import rank_names
from dsmoe.runtime.heartbeat import HeartbeatTimer
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.waiting import run_watched
from dsmoe.runtime.watchdog import HEARTBEAT_SECONDS, Watchdog, process_watchdog

POLL_SECONDS = 0.005


class DisagreementError(UserError):
    """The ranks of a group are about to exchange different shapes."""


@torch.compiler.disable
def agree(group: ExpertGroup, x_TD: torch.Tensor, num_experts: int, how: str) -> None:
    """Wait until every rank of `group` is about to exchange the same shape in the same layer; return at once if agreed.

    Args:
        group: the ranks; its `label` names the layer.
        x_TD: the tokens of this rank. Their number may differ from rank to rank; messages show it.
        num_experts: E.
        how: the rest that must be the same: choices per token, and the rule for the rows sent.

    Raises:
        DisagreementError: another rank is about to exchange another shape.
        LostRanksError: another rank does not come.
    """
    if group.handle is None:  # not a group of torch: no rank to ask
        return
    watch = process_watchdog()
    intent = f"{group.label}, exchange of rows of {x_TD.shape[1]} x {x_TD.dtype} to {num_experts} experts, {how}"
    agreed = watch.agreed.setdefault(tuple(dist.get_process_group_ranks(group.handle)), set())
    if intent not in agreed:
        # In a thread: a store in a process that is stopped may never answer.
        run_watched(lambda: _agree(watch, group, intent, len(x_TD), len(agreed)))
        agreed.add(intent)
    watch.record(intent)


def _agree(watch: Watchdog, group: ExpertGroup, intent: str, num_tokens: int, number: int) -> None:
    """Write this rank's intent into the store, read the others' and compare."""
    ranks = dist.get_process_group_ranks(group.handle)
    # `number` counts what the group has agreed on, so the keys of one agreement are the same on all its ranks.
    keys = {rank: f"dsmoe/agree/{'-'.join(map(str, ranks))}/{number}/{rank}" for rank in ranks}
    watch.store.set(keys[watch.rank], json.dumps([intent, num_tokens]))
    waited, next_look = HeartbeatTimer(HEARTBEAT_SECONDS), time.monotonic() + HEARTBEAT_SECONDS
    intents: dict[int, tuple[str, int | None]] = {}
    while len(intents) < len(ranks):
        waiting = [rank for rank in ranks if rank not in intents]
        if time.monotonic() > next_look:
            next_look = time.monotonic() + HEARTBEAT_SECONDS
            # Positions before entries: a rank writes its entry before it goes on, so the entry cannot be missed.
            positions = watch.positions_of(waiting)
            # A rank with more positions recorded and no entry is past this point: it agreed on its shape before.
            silent = {r: position.activity for r, position in positions.items() if position.count > watch.count}
            intents.update({r: (doing, None) for r, doing in silent.items() if not watch.store.check([keys[r]])})
        written = {rank: watch.store.get(keys[rank]) for rank in waiting if watch.store.check([keys[rank]])}
        intents.update({rank: tuple(json.loads(text)) for rank, text in written.items()})
        if waited.update() > watch.timeout.total_seconds():
            come = "has" if len(waiting) == 1 else "have"
            raise LostRanksError(f"{rank_names(waiting)} {come} not come to {intent} within {waited.seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    if len({what for what, _ in intents.values()}) > 1:
        raise DisagreementError(_explain(intents))


def _explain(intents: dict[int, tuple[str, int | None]]) -> str:
    """Return a message with the ranks of each intent, the smallest party first: most likely the wrong one."""
    parties: dict[str, list[int]] = {}
    for rank, (what, _) in sorted(intents.items()):
        parties.setdefault(what, []).append(rank)
    lines = []
    for what, ranks in sorted(parties.items(), key=lambda party: len(party[1])):
        tokens = sorted({number for rank in ranks if (number := intents[rank][1]) is not None})
        bring = f" ({' or '.join(map(str, tokens))} tokens)" if tokens else ""
        lines.append(f"{rank_names(ranks)}: {what}{bring}")
    return "the ranks of an expert group are not about to exchange the same:\n  " + "\n  ".join(lines)
