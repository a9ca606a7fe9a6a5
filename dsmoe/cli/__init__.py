"""The `dsmoe` command: what each of its commands takes, and what it does; a module says which of them it has."""

from dsmoe.cli.command import main

__all__ = ["main"]
