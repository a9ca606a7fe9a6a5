"""The `dsmoe` command: one module per group of commands, with their arguments and what they call."""

from dsmoe.cli.command import main

__all__ = ["main"]
