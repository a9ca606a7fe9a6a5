"""A port for the processes that a test starts, which no other test is given."""

from __future__ import annotations

import random
import socket
import sys

PORTS = range(30_000, 32_768)
"""Above those that dsmoe derives of a launcher's number, below those that Linux hands out to whoever asks for any."""
_marks: list[socket.socket] = []
"""What makes ports this process' own until it ends, however that is."""


def free_port() -> str:
    """One of this machine that no program has now, and no process of the tests is given while this one lives."""
    for port in random.Random().sample(PORTS, len(PORTS)):  # the tests' own draws stay as they are
        mark = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform == "linux":  # where these names, like ports, are those of a network namespace
                mark.bind(f"\0dsmoe/tests/port/{port}")
            with socket.socket() as free:
                free.bind(("", port))
        except OSError:
            mark.close()
            continue
        _marks.append(mark)
        return str(port)
    raise OSError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")
