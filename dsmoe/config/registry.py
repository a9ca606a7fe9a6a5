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
        UserError: there is no such entry, and names those that there are; or it has the name of another.
    """
    if name not in entries:
        raise UserError(f"{key} must be one of {', '.join(entries)}, not {name!r}")
    entry = entries[name]
    if getattr(entry, "name", name) != name:  # it is copied and pickled by its own name
        raise UserError(f"{key}: the entry of {name!r} is called {getattr(entry, 'name', None)!r}; give it its key")
    return entry
