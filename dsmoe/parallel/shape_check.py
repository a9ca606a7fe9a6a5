"""Before ranks exchange a shape for the first time they agree on it, or all stop with the reason.

An exchange of which the ranks have different ideas does not fail: it waits, or moves bytes to the wrong places. So
whoever meets a (layer, shape) that it has not exchanged yet says so in the store and waits until the rest of its group
has said the same. Shapes that were agreed on cost a set lookup, and no rank is asked anything.

A rank to which a shape is new when it is not to others cannot wait for them to say something: they are in the exchange
already. It learns that from their notes in `dsmoe.runtime.watchdog`.
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
    """The ranks of a group have different ideas of what they exchange."""


@torch.compiler.disable
def agree(group: ExpertGroup, x_TD: torch.Tensor, num_experts: int, how: str) -> None:
    """Wait until every rank of `group` is about to exchange the same in the same layer; at once if it ever was.

    Args:
        group: who exchanges; its `label` names the layer.
        x_TD: the tokens of this rank. Their number may differ from rank to rank; it is only told.
        num_experts: E.
        how: what else must be the same: choices per token, and how many rows are sent.

    Raises:
        DisagreementError: another rank is about to do something else.
        LostRanksError: another rank does not come.
    """
    if group.handle is None:  # not torch's: there is nobody to ask
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
    """Say what this rank is about to do, hear what the others are, and compare."""
    ranks = dist.get_process_group_ranks(group.handle)
    keys = {rank: f"dsmoe/agree/{'-'.join(map(str, ranks))}/{number}/{rank}" for rank in ranks}
    watch.store.set(keys[watch.rank], json.dumps([intent, num_tokens]))
    waited, look_at_notes = HeartbeatTimer(HEARTBEAT_SECONDS), time.monotonic() + HEARTBEAT_SECONDS
    intents: dict[int, tuple[str, int | None]] = {}
    while len(intents) < len(ranks):
        waiting = [rank for rank in ranks if rank not in intents]
        if time.monotonic() > look_at_notes:
            look_at_notes = time.monotonic() + HEARTBEAT_SECONDS
            positions = watch.positions_of(waiting)
            # Who has come as far and says nothing here knows the shape that it exchanges from before.
            silent = {r: position.activity for r, position in positions.items() if position.count > watch.count}
            intents.update({r: (doing, None) for r, doing in silent.items() if not watch.store.check([keys[r]])})
        said = {rank: watch.store.get(keys[rank]) for rank in waiting if watch.store.check([keys[rank]])}
        intents.update({rank: tuple(json.loads(text)) for rank, text in said.items()})
        if waited.update() > watch.timeout.total_seconds():
            come = "has" if len(waiting) == 1 else "have"
            raise LostRanksError(f"{rank_names(waiting)} {come} not come to {intent} within {waited.seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    if len({what for what, _ in intents.values()}) > 1:
        raise DisagreementError(_explain(intents))


def _explain(intents: dict[int, tuple[str, int | None]]) -> str:
    """Who is about to do what; the fewest first, for they are the odd ones."""
    parties: dict[str, list[int]] = {}
    for rank, (what, _) in sorted(intents.items()):
        parties.setdefault(what, []).append(rank)
    lines = []
    for what, ranks in sorted(parties.items(), key=lambda party: len(party[1])):
        tokens = sorted({number for rank in ranks if (number := intents[rank][1]) is not None})
        bring = f" ({' or '.join(map(str, tokens))} tokens)" if tokens else ""
        lines.append(f"{rank_names(ranks)}: {what}{bring}")
    return "the ranks of an expert group are not about to exchange the same:\n  " + "\n  ".join(lines)
