"""The command `dsmoe config`: show, check and schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.cli.config_arguments import add_config_arguments, load, print_notes
from dsmoe.config import Config, dump_config
from dsmoe.config.dump import json_schema
from dsmoe.config.errors import Problem
from dsmoe.plan import Plan
from dsmoe.plan.devices import device_problems


def add_commands(commands: Any) -> None:
    """Add `dsmoe config`."""
    config = commands.add_parser("config", help="look at a config, check it, or print its JSON Schema")
    views = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = views.add_parser("show", help="print the resolved YAML, every default included")
    add_config_arguments(show, _show)
    check = views.add_parser("check", help="report every problem at once")
    add_config_arguments(check, _check)
    schema = views.add_parser("schema", help="print the JSON Schema, for completion in editors")
    schema.set_defaults(run=_schema)


def _show(arguments: argparse.Namespace) -> None:
    print(dump_config(load(arguments)), end="")


def _check(arguments: argparse.Namespace) -> None:
    from dsmoe.config.input_files import input_problems
    from dsmoe.data.check_sources import check_sources
    from dsmoe.launch.hosts import host_problems

    notes: list[str] = []

    def look(config: Config) -> list[Problem]:
        found = check_sources(config)
        notes.extend(found.notes)
        return found.problems

    config = load(arguments, input_problems, host_problems, look, device_problems)
    plan = Plan.from_config(config)
    notes += _notes_on_beginning(plan)
    print(f"{arguments.config}: ok")
    print(plan.headline)
    print(plan.batch.explain())
    print_notes(notes)


def _notes_on_beginning(plan: Plan) -> Sequence[str]:
    """Return the notes of a start on its run folder and on the checkpoint that it begins with.

    Raises:
        UserError: a start would refuse them.
    """
    config, start = plan.config, plan.config.checkpoint
    has_none = start.resume in ("auto", "never") and start.weights_from is None
    if has_none and not Path(config.runs_dir, config.name).exists():
        return ()
    from dsmoe.train.run_folder import check_run_folder  # which imports torch

    return check_run_folder(plan).notes


def _schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))
