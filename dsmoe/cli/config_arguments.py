"""Arguments of commands that take a config: the YAML file, overrides, loading, and notes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsmoe.config import Config, load_config
from dsmoe.config.load import ConfigCheck


def add_config_arguments(parser: argparse.ArgumentParser, run: object) -> None:
    """Add the arguments of a YAML file and overrides to a command, and `run` as its function."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    add_override_arguments(parser)
    parser.set_defaults(run=run)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of any number of overrides to a command."""
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="set a key over the file, for example moe.top_k=4"
    )


def load(arguments: argparse.Namespace, *checks: ConfigCheck) -> Config:
    """Load the config of a command's arguments, with further checks.

    Raises:
        UserError: the config has problems.
    """
    return load_config(arguments.config, arguments.overrides, *checks)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes to standard error, apart from the output of the command."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
