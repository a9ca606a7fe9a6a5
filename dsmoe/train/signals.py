"""SIGTERM, SIGINT, SIGHUP and SIGUSR1: all ranks stop after the same step, whichever of them were told to."""

from __future__ import annotations

import logging
import signal
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Agreement of all ranks to stop after the same step, once any of them has a signal. Making it is collective.

    Hosts may be steps ahead of their devices and of one another, so that nobody can just stop. Every step begins a
    reduction over the hosts and looks at the result of the one before: neither host nor device waits for it.

    Args:
        timeout: how long a rank may be behind the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout, group_desc="signals")
        self._world = dist.get_world_size()
        self._told: signal.Signals | None = None
        self._ends = False
        """True once the run ends: a launcher may send its signal to ranks that have stopped for another's."""
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._answer: dist.Work | None = None

    def listen(self) -> None:
        """Take note of signals from now on, in place of dying of them; a second SIGINT ends the process as usual.

        SIGHUP, which says that a terminal has gone, stays ignored where it is: so `nohup` starts programs.
        """
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take_note)

    def agreed(self) -> bool:
        """Return whether to stop now: whether any rank had a signal at the last call. Call it after every step."""
        first = self._world
        if self._answer is not None:
            self._answer.wait()
            first = self._world - int(self._asked.item())
        if first < self._world and self._told is None:
            logger.warning("rank %d was told to stop: saving a checkpoint, then stopping", first)
        # Of the ranks that were told, the first has the largest number; 0 if there is none.
        own = self._world - dist.get_rank() if self._told is not None else 0
        self._asked = torch.tensor([own], dtype=torch.int32)
        self._answer = dist.all_reduce(self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._ends = first < self._world
        return self._ends

    def told(self) -> bool:
        """Return whether this rank has a signal to stop."""
        return self._told is not None

    def finish(self) -> None:
        """Wait for the last reduction, so that no rank leaves while another is in it."""
        self._ends = True
        if self._answer is not None:
            self._answer.wait()
            self._answer = None

    def _take_note(self, number: int, _: FrameType | None) -> None:
        self._told = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._ends:
            logger.warning("%s: saving a checkpoint after one of the next steps, then stopping", self._told.name)
