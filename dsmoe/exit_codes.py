"""Exit codes of dsmoe's programs, by which job scripts, containers and launchers decide.

`dsmoe.config.errors` maps errors to them. With the standard library alone.
"""

from __future__ import annotations

import signal

DONE = 0
FAILED = 1
"""An error that another try may not have, and every unknown one."""
USER_ERROR = 2
"""Somebody has to change something first: job scripts and containers do not start the run again."""
STOPPED = 75
"""A signal has stopped the run after a checkpoint; started again, the run continues from there (EX_TEMPFAIL)."""
NO_PROGRAM = 127
"""There is no such program; the shells' code."""


def of_signal(number: int) -> int:
    """Return the shells' exit code of a process that died of a signal."""
    return 128 + number


INTERRUPTED = of_signal(signal.SIGINT)
"""After Ctrl-C."""
