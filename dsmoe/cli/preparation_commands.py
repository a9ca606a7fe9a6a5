"""The commands before a long run: `dsmoe parity`, `dsmoe preflight` and `dsmoe prepare`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from dsmoe.cli.config_arguments import add_config_arguments, load
from dsmoe.config import Config
from dsmoe.parity.layouts import parse_layouts
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.start import begin_command, exit_process


def add_commands(commands: Any) -> None:
    """Add `dsmoe parity`, `dsmoe preflight` and `dsmoe prepare`."""
    parity = commands.add_parser("parity", help="train a few steps on several layouts: is it the same model?")
    parity.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="tp=2,ep=4",
        help="degrees of each layout: tp, sp (sequence), ep, etp, dp, zero, a2a, chunks, nodes, or section.key",
    )
    parity.add_argument(
        "--steps", type=_positive_integer, default=5, help="optimizer steps on each layout (default: 5)"
    )
    parity.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    parity.add_argument("--full", action="store_true", help="the config's own sizes and corpora, not shrunk ones")
    add_config_arguments(parity, _parity)

    preflight = commands.add_parser("preflight", help="under a launcher: check every node and link before a long job")
    preflight.add_argument("--json", metavar="FILE", type=Path, help="the numbers (default: preflight.json of the run)")
    add_config_arguments(preflight, _preflight)

    prepare = commands.add_parser("prepare", help="tokenize and pack the corpora, once")
    add_config_arguments(prepare, _prepare)


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def _parity(arguments: argparse.Namespace) -> int:
    def check(_: Config) -> None:
        rendezvous = Rendezvous.from_environment()
        parse_layouts(arguments.layouts, rendezvous.size if rendezvous.is_launched else None)

    start = begin_command(arguments.config, arguments.overrides, check)
    code = start.ended()
    if code is None:
        from dsmoe.parity.check_parity import check_parity

        options = {"steps": arguments.steps, "precision": arguments.precision, "full": arguments.full}
        code = check_parity(arguments.config, arguments.overrides, arguments.layouts, **options)
    if Rendezvous.from_environment().is_launched:
        exit_process(code)
    return code


def _preflight(arguments: argparse.Namespace) -> None:
    start = begin_command(arguments.config, arguments.overrides)
    code = start.ended()
    if code is None:
        from dsmoe.preflight.check_nodes import check_cluster

        code = check_cluster(start, arguments.json)
    exit_process(code)


def _prepare(arguments: argparse.Namespace) -> None:
    config = load(arguments)
    from dsmoe.data import prepare

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sources = prepare(config)
    print(f"{len(sources)} sources ready in {config.data.cache_dir}")
