"""Wait for what is to happen, however slow the machine is, and not for a time in which it should have."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(is_so: Callable[[], object], seconds: float = 60.0) -> None:
    """Return as soon as `is_so`; fail after so many seconds, which are for what never happens."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)
