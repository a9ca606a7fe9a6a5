"""Heartbeat timer that ignores time in which this process itself stood still, and calls with a timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class HeartbeatTimer:
    """Seconds since the last heartbeat, counting only time in which this process was running.

    The clock of a suspended host, or of a stopped process, is ahead when it resumes, and no heartbeat could arrive
    meanwhile. So each interval between two updates counts at most `max_interval`.

    Args:
        max_interval: seconds; longer than two updates are apart in a running process.
    """

    # With max_interval = 6, updates at these times of the clock, no heartbeat:
    #   1000.0   created            seconds = 0
    #   1000.5   interval 0.5       seconds = 0.5
    #   1002.5   interval 2.0       seconds = 2.5
    #   88902.5  interval 86,400    seconds = 8.5    (the host was suspended for a day: 6 of it count)
    #   88903.5  a heartbeat        seconds = 0

    def __init__(self, max_interval: float) -> None:
        self.seconds = 0.0
        """The value at the last update."""
        self._max_interval = max_interval
        self._updated = time.monotonic()

    def update(self, is_beat: bool = False) -> float:
        """Add the time since the last update, or start again from 0 at a heartbeat; returns the seconds."""
        now = time.monotonic()
        self.seconds = 0.0 if is_beat else self.seconds + min(now - self._updated, self._max_interval)
        self._updated = now
        return self.seconds


def call_with_timeout(seconds: float, action: Callable[[], T]) -> T | None:
    """Return the result of `action`, or None where it fails or takes longer.

    `action` runs in a daemon thread, which a timeout leaves running: a store on an unreachable host may never answer.
    """
    result: list[Any] = [None]

    def act() -> None:
        try:
            result[0] = action()
        except Exception:
            result[0] = None

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0]
