"""Registries: mappings from names that a config may choose to entries with everything that depends on the name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from dsmoe.config.errors import UserError

T = TypeVar("T")


def entry_named(entries: Mapping[str, T], key: str, name: str) -> T:
    """Return the entry of this name.

    Args:
        entries: the registry.
        key: the option that chooses the name, for the message.
        name: the chosen name.

    Raises:
        UserError: there is no such entry, or the entry's own name differs.
    """
    if name not in entries:
        raise UserError(f"{key} must be one of {', '.join(entries)}, not {name!r}")
    entry = entries[name]
    if getattr(entry, "name", name) != name:  # copies and pickles look the entry up by its own name
        raise UserError(f"{key}: the entry of {name!r} is called {getattr(entry, 'name', None)!r}; give it its key")
    return entry
