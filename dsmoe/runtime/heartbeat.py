"""For how long others have been silent, as far as this process has watched; and what may never come to an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Silence:
    """Seconds without a sign, of which only those count in which this process looked.

    The clocks of a host that was suspended, or of a process that was stopped, have gone on when it comes back, and
    nobody could give it a sign meanwhile. So of the time between two looks no more than `most` counts.

    Args:
        most: more than looks are apart while the process runs.
    """

    def __init__(self, most: float) -> None:
        self.seconds = 0.0
        """How long it was at the last look."""
        self._most = most
        self._looked = time.monotonic()

    def look(self, is_sign: bool = False) -> float:
        """Look again; returns the seconds since the last sign, 0 if this is one."""
        now = time.monotonic()
        self.seconds = 0.0 if is_sign else self.seconds + min(now - self._looked, self._most)
        self._looked = now
        return self.seconds


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """What `action` returns, or None where it fails or takes longer: a store on a host that is cut off may never."""
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
