"""Standard streams that always exist, and whose errors never decide the outcome of a command."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def open_missing_streams() -> None:
    """Open the null device for every closed standard stream (`>&-`): else the next opened file takes its descriptor."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def tolerate_stream_errors() -> None:
    """Open missing streams, and keep printing, by any library, from failing; for programs whose output is a by-product.

    If the terminal is gone (SIGHUP), the disk under a log is full, or the reader has ended, the text is lost and
    nothing else. Characters that the encoding lacks are escaped.
    """
    open_missing_streams()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # replaced by a test or a notebook
            continue
        with suppress(OSError):
            stream.flush()
        tolerant = io.TextIOWrapper(
            io.BufferedWriter(_TolerantFile(descriptor, "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, tolerant)
        setattr(sys, f"__{name}__", tolerant)


def flush_streams() -> None:
    """Flush standard output and error; text that cannot be written is lost."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python flushes again at exit, and would exit with 120
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _TolerantFile(io.FileIO):
    """A file whose writes never fail."""

    def write(self, data: Any) -> int:
        written = None  # also the result of a full stream that must not block (O_NONBLOCK)
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written
