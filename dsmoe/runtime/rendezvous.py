"""Which rank this process is and where the ranks meet, by the variables that torch and DeepSpeed know.

All of dsmoe takes them from here. Under `srun` and the launchers of `dsmoe.runtime.launchers`, which have names of
their own, `dsmoe.runtime.world` fills them in first, and is also what checks them: read here, what is no number is not
set.

With the standard library alone, for `dsmoe.launch.attempts`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

MOST_DIGITS = 18
"""A longer number is a mistake, and Python refuses to read one of thousands of digits."""
AGENTS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""What torchrun's agent and DeepSpeed's launch.py set for their ranks; both stay until these have ended."""


@dataclass(frozen=True)
class Rendezvous:
    """What a rank is told of itself and of where all of them meet; None for what it is not told."""

    rank: int | None = None
    local_rank: int | None = None
    """Its number on its host."""
    size: int | None = None
    """How many ranks there are."""
    local_size: int | None = None
    address: str | None = None
    """Of rank 0's host."""
    port: int | None = None
    """There; 0 where the ranks meet in a file, or there is one alone."""
    restart: str = "0"
    """How often torchrun has started the ranks anew."""
    is_launched: bool = False
    """Whether this process is told a rank at all."""
    is_first_of_host: bool = True
    """Whether it is its host's first; also known of a task of `srun` before that is told its rank."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rendezvous:
        """What is set now."""
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
            is_first_of_host=local_rank.strip() == "0",
        )

    @property
    def place(self) -> str:
        """Where the ranks meet, in a message."""
        return f"{self.address}:{self.port}"

    def complete(self) -> tuple[int, int, str, int] | None:
        """The rank, how many there are, and where they meet, address and port; None where one of these is not told."""
        if self.rank is None or self.size is None or self.address is None or self.port is None:
            return None
        return self.rank, self.size, self.address, self.port

    def variables(self) -> dict[str, str]:
        """The variables that say so to torch and DeepSpeed, of a process that is started here."""
        said = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.size,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in said.items() if value is not None}


def variables_of_agent(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank and the scripts that start it have in their environment, and the agent that started them has not."""
    return {name: environment[name] for name in (*AGENTS, "RANK") if name in environment}


def slurm_attempt(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The number of Slurm's job, and how often Slurm has begun it again, as they are written."""
    return environment.get("SLURM_JOB_ID", "no job"), environment.get("SLURM_RESTART_COUNT", "0")


def is_whole_number(text: str) -> bool:
    """Whether it is a whole number from 0 on, perhaps with spaces around."""
    digits = text.strip()
    return digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if is_whole_number(text) else None
