"""For how long something has given no sign of life, as far as this process has watched."""

from __future__ import annotations

import time


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
