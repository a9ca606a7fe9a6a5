"""Standard streams that are always there, and whose trouble never decides what a command has done."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def open_missing_streams() -> None:
    """Open the null device for every standard stream that is closed (`>&-`): the next file to be opened would be it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def steady_streams() -> None:
    """The same, and let no printing fail from now on, of whichever library: for a program that prints beside its work.

    A terminal that is gone (SIGHUP), a full disk under a log, a reader that has ended: what is printed is lost then,
    and nothing else. What an encoding does not have is printed as an escape.
    """
    open_missing_streams()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # a test or a notebook has put its own there
            continue
        with suppress(OSError):
            stream.flush()
        steady = io.TextIOWrapper(
            io.BufferedWriter(_Steady(descriptor, "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, steady)
        setattr(sys, f"__{name}__", steady)


def finish_streams() -> None:
    """Write out what has been printed, as far as that goes."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python tries again at its exit, and would end with 120
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Steady(io.FileIO):
    """A file that takes everything."""

    def write(self, data: Any) -> int:
        written = None  # also what a stream that must not wait (O_NONBLOCK) has taken when it is full
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written
