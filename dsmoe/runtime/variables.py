"""Read whole numbers and addresses from the environment; anything else in them is one clear error."""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe.config.errors import UserError
from dsmoe.runtime.rendezvous import is_whole_number

WANTED = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


class LauncherError(UserError):
    """What the launcher says of this process cannot be, or is not all; other ranks may have no such trouble."""


def how_to_start() -> str:
    """The end of a message that nothing can be made of the variables."""
    return f"start the ranks with torchrun, deepspeed, srun or mpirun, or set {WANTED} for each"


def whole_number(environment: Mapping[str, str], name: str, advice: str = "") -> int:
    """The whole number from 0 on that the variable `name` has.

    Args:
        environment: has the variable.
        name: of the variable.
        advice: the end of the message; by default how to start the ranks.

    Raises:
        LauncherError: it has another value.
    """
    if not is_whole_number(environment[name]):
        wanted = f"{name} is {shown(environment[name])}, and is to be a whole number from 0 on"
        raise LauncherError(f"{wanted}; {advice or how_to_start()}")
    return int(environment[name])


def check_address(environment: Mapping[str, str], name: str) -> None:
    """Check that a variable has what may be a host's name or address; whether there is such a host is not asked.

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
    """A variable's value in quotes, in a message; of a long one the beginning."""
    return repr(value) if len(value) <= 80 else f"{value[:80]!r}... ({len(value):,} characters)"
