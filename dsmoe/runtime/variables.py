"""Variables of the environment as whole numbers and addresses; anything else in them is one clear error."""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe.config.errors import UserError
from dsmoe.runtime.rendezvous import is_whole_number

RANK_VARIABLES = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


class LauncherError(UserError):
    """The launcher's variables of this process are incomplete or contradict each other; other ranks' need not."""


def start_advice() -> str:
    """Return the end of a message about variables that cannot be used: how to start ranks."""
    return f"start the ranks with torchrun, deepspeed, srun or mpirun, or set {RANK_VARIABLES} for each"


def whole_number(environment: Mapping[str, str], name: str, advice: str = "") -> int:
    """Return the variable `name` as a whole number from 0 on.

    Args:
        environment: must have the variable.
        name: the variable's name.
        advice: the end of the error's text; by default how to start the ranks.

    Raises:
        LauncherError: the variable is no such number.
    """
    if not is_whole_number(environment[name]):
        wanted = f"{name} is {shown(environment[name])}, and is to be a whole number from 0 on"
        raise LauncherError(f"{wanted}; {advice or start_advice()}")
    return int(environment[name])


def check_address(environment: Mapping[str, str], name: str) -> None:
    """Check that a variable can be a host's name or address, without resolving it.

    Raises:
        LauncherError: no host can have that name.
    """
    text = environment[name]
    try:
        text.encode("idna")
        is_name = text == text.strip() and len(text.split()) == 1
    except UnicodeError:  # a part that is empty or too long, or bytes that are no text
        is_name = False
    if not is_name:
        raise LauncherError(f"{name} is {shown(text)}, and is to be the name or the address of rank 0's host")


def shown(value: str) -> str:
    """Return a variable's value in quotes, for a message; of a long value the beginning."""
    return repr(value) if len(value) <= 80 else f"{value[:80]!r}... ({len(value):,} characters)"
