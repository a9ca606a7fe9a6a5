"""A port for the processes that a test starts."""

from __future__ import annotations

import socket


def free_port() -> str:
    """One of this machine that no program has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
