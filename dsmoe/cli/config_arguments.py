"""What several commands have in common: the config that they take, and notes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsmoe.config import Config, load_config
from dsmoe.config.load import Look


def takes_config(parser: argparse.ArgumentParser, run: object) -> None:
    """Let a command take a YAML file and overrides; `run` is what it does."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    takes_overrides(parser)
    parser.set_defaults(run=run)


def takes_overrides(parser: argparse.ArgumentParser) -> None:
    """Let a command take overrides, as many as there are."""
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="set a key over the file, for example moe.top_k=4"
    )


def load(arguments: argparse.Namespace, *looks: Look) -> Config:
    """The config that a command was given, which `looks` check as well.

    Raises:
        UserError: something is wrong in it.
    """
    return load_config(arguments.config, arguments.overrides, *looks)


def print_notes(notes: Sequence[str]) -> None:
    """Print what does not stop a command, apart from its output."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
