"""The commands `dsmoe plan`, which describes a run, and `dsmoe launch`, which writes what starts it."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from dsmoe.cli.config_arguments import add_config_arguments, load, print_notes
from dsmoe.config import Config
from dsmoe.launch.job import Request, default_folder
from dsmoe.launch.programs import activation
from dsmoe.plan import Plan
from dsmoe.plan.devices import device_problems

_WAYS = {
    "--hostfile": ("hosts", "a hostfile and an environment, for `deepspeed` over ssh"),
    "--slurm": ("slurm", "job scripts, for sbatch"),
    "--docker": ("docker", "a compose file, for containers"),
}
"""The ways to start a run, by option of `dsmoe launch`: the module of dsmoe.launch, and a phrase on its files."""


def add_commands(commands: Any) -> None:
    """Add `dsmoe plan` and `dsmoe launch`."""
    plan = commands.add_parser("plan", help="say what a run will be: its ranks and groups, batch, parameters, FLOPs")
    plan.add_argument("--json", action="store_true", help="as one JSON object, for a program")
    add_config_arguments(plan, _plan)

    launch = commands.add_parser("launch", help="write what starts the run on a cluster, and print the command")
    way = launch.add_mutually_exclusive_group(required=True)
    for option, (module, what) in _WAYS.items():
        way.add_argument(option, dest="renderer", action="store_const", const=module, help=what)
    launch.add_argument("--dry-run", action="store_true", help="print the files' text, and write nothing")
    launch.add_argument("--out", metavar="DIR", help="the folder to write to (default: launch/NAME of the run)")
    add_config_arguments(launch, _launch)


def _plan(arguments: argparse.Namespace) -> None:
    config = load(arguments, device_problems)
    plan = Plan.from_config(config)
    notes = _notes_on_sources(config)
    print(json.dumps(plan.json(), indent=2) if arguments.json else plan.text())
    print_notes(notes)


def _launch(arguments: argparse.Namespace) -> None:
    config = load(arguments, device_problems)
    plan = Plan.from_config(config)
    notes = _notes_on_sources(config)
    folder = arguments.out or default_folder(config)
    request = Request(plan, arguments.config, tuple(arguments.overrides), folder)
    job = import_module(f"dsmoe.launch.{arguments.renderer}").job(request)
    if arguments.dry_run:
        print(plan.headline)
        for name, text in job.files.items():
            print(f"\n==> {Path(folder) / name}\n{text}", end="")
    else:
        paths = job.write(Path(folder))
        print("\n".join([plan.headline, *(f"wrote {path}" for path in paths)]))
    if job.warning:
        print(f"\n{job.warning}")
    print_notes(notes)
    if arguments.renderer == "hosts" and (first := activation("deepspeed")) is not None:
        print(f"\nthis shell does not find deepspeed by its name; type first:\n{first}")
    print(f"\nto start it, type in this folder:\n{job.command}")


def _notes_on_sources(config: Config) -> list[str]:
    """Return a note for each source without text on this machine; a plan needs neither text nor cache."""
    from dsmoe.data.corpus_files import may_be_lost

    lost = [source for source in config.data.sources if may_be_lost(source)]
    if any(any(Path(config.data.cache_dir).glob(f"{source.name}-*")) for source in lost):
        from dsmoe.data.check_sources import notes_on_sources  # which takes a while

        return notes_on_sources(config)
    advice = "`dsmoe config check`, where the run is to be, says whether it is there"
    return [f"data.sources[{source.name}].path: there is no text at {source.path}; {advice}" for source in lost]
