"""Registries: mappings from the names that a config may choose to entries with all that depends on the name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from dsmoe.config.errors import UserError

T = TypeVar("T")


def entry_named(entries: Mapping[str, T], key: str, name: str) -> T:
    """Return the entry of this name.

    Args:
        entries: the registry.
        key: the option whose values are its names, for the message.
        name: the name.

    Raises:
        UserError: there is no such entry; names those that there are.
    """
    if name not in entries:
        raise UserError(f"{key} must be one of {', '.join(entries)}, not {name!r}")
    return entries[name]
