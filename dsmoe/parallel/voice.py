"""One voice per host for ranks that cannot ask each other: the store in which they would agree has gone."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping

_held: list[socket.socket] = []
"""What makes this process the voice of its host, until it ends."""


def speaks_for_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first rank of its run on this host that asks, since the ranks that asked before it ended.

    An abstract Unix socket is bound, which the kernel frees when its process ends, however that is. Ranks in containers
    with a network of their own are on hosts of their own here. Where there are no such sockets, the host's first rank
    speaks.
    """
    if _held:
        return True
    if sys.platform != "linux":
        return environment.get("LOCAL_RANK", "0") == "0"
    run = "/".join(environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    name = hashlib.sha256(f"{os.getuid()}/{run}".encode()).hexdigest()[:32]
    voice = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        voice.bind(f"\0dsmoe/voice/{name}")
    except OSError:
        voice.close()
        return False
    _held.append(voice)
    return True
