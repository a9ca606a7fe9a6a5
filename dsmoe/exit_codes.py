"""The exit codes of dsmoe's programs, by which job scripts, containers and launchers go.

Which of them an error has, `dsmoe.config.errors` says. With the standard library alone.
"""

from __future__ import annotations

import signal

DONE = 0
FAILED = 1
"""What may be right at another try, and all that is not known better."""
USER_ERROR = 2
"""Somebody has to change something first: whatever starts runs again by itself leaves one that has ended with this."""
STOPPED = 75
"""A signal has stopped the run after a checkpoint, and it goes on when it is started again (EX_TEMPFAIL)."""
NO_PROGRAM = 127
"""There is no such program, as shells say it."""


def of_signal(number: int) -> int:
    """What shells make of a process that died of a signal."""
    return 128 + number


INTERRUPTED = of_signal(signal.SIGINT)
"""After Ctrl-C."""
