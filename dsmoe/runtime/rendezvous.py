"""Rendezvous: this process' rank and the address at which the ranks meet, by the variables of torch and DeepSpeed.

Under `srun` and the launchers of `dsmoe.runtime.launchers`, which have variables of their own,
`dsmoe.runtime.world.set_rank_variables` sets torch's first, and checks them. A variable that is no number counts here
as not set.

With the standard library alone, for `dsmoe.launch.attempts`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

MAX_DIGITS = 18
"""A longer number is a mistake, and Python refuses to parse one of thousands of digits."""
AGENT_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun's agent and DeepSpeed's launch.py set for their ranks; both outlive their ranks."""


@dataclass(frozen=True)
class Rendezvous:
    """A rank's number and the address of the rendezvous, as far as set in the environment; None where not."""

    rank: int | None = None
    local_rank: int | None = None
    """The number among the ranks of the host."""
    size: int | None = None
    """The number of ranks."""
    local_size: int | None = None
    """The number of ranks on this host."""
    address: str | None = None
    """The name or address of rank 0's host."""
    port: int | None = None
    """The port on that host; 0 if the rendezvous is a file, or there is a single rank."""
    restart: str = "0"
    """The number of times that torchrun has restarted the ranks."""
    is_launched: bool = False
    """True if RANK is set at all."""
    is_host_leader: bool = True
    """True for the first rank of a host; known for a task of `srun` before its RANK is set, too."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rendezvous:
        """Read the variables as they are now."""
        local_rank = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
        return cls(
            rank=_number(environment, "RANK"),
            local_rank=_number(environment, "LOCAL_RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_size=_number(environment, "LOCAL_WORLD_SIZE"),
            address=environment.get("MASTER_ADDR"),
            port=_number(environment, "MASTER_PORT"),
            restart=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            is_launched="RANK" in environment,
            is_host_leader=local_rank.strip() == "0",
        )

    @property
    def endpoint(self) -> str:
        """`address:port`, for messages."""
        return f"{self.address}:{self.port}"

    def complete(self) -> tuple[int, int, str, int] | None:
        """Return (rank, size, address, port), or None if one of them is not set."""
        if self.rank is None or self.size is None or self.address is None or self.port is None:
            return None
        return self.rank, self.size, self.address, self.port

    def variables(self) -> dict[str, str]:
        """Return the environment variables by which torch and DeepSpeed read the same."""
        values = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.size,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def agent_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that an agent has set for a rank and the scripts that start it, and does not have itself."""
    return {name: environment[name] for name in (*AGENT_VARIABLES, "RANK") if name in environment}


def slurm_attempt(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return the number of Slurm's job and of its restarts, as texts."""
    return environment.get("SLURM_JOB_ID", "no job"), environment.get("SLURM_RESTART_COUNT", "0")


def is_whole_number(text: str) -> bool:
    """Return whether `text` is a whole number from 0 on, perhaps with spaces around."""
    digits = text.strip()
    return digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if is_whole_number(text) else None


ENDED, SILENT = "has ended: nobody answers", "is stopped or hangs: somebody listens, and does not answer,"
CONNECT_SECONDS = 5.0


def probe_store() -> str | None:
    """Return the state of the process that has the store: `ENDED`, `SILENT`, or None where that cannot be known.

    For a store that does not answer. In a message, ` at 10.0.0.1:29500` follows.
    """
    rendezvous = Rendezvous.from_environment()
    if rendezvous.address is None or not rendezvous.port:  # the rendezvous was a file
        return None
    try:
        socket.create_connection((rendezvous.address, rendezvous.port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return ENDED
    except (OSError, ValueError):
        return None
    return SILENT
