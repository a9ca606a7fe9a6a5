"""From the command line to a verdict: `deepspeed launch/preflight.py --config CONFIG [section.key=value ...]`.

Exit codes: 0 the cluster is fine; 1 a rank or link is far off, versions differ, or ranks are missing; 2 the user's
input is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from dsmoe.config.schema import Config
from dsmoe.launch.world import join_slurm, launched_world
from dsmoe.parallel import join_processes, leave_processes
from dsmoe.parallel.distributed import quiet_deepspeed, set_timeout_everywhere
from dsmoe.parallel.lost import LostRanksError
from dsmoe.parallel.watch import process_watch
from dsmoe.plan import resolve_device
from dsmoe.plan.elastic import fit_to_world
from dsmoe.preflight.judge import Verdict
from dsmoe.preflight.report import text, write_json
from dsmoe.preflight.results import RankReport
from dsmoe.preflight.stages import Preflight
from dsmoe.train.folder import run_folder
from dsmoe.train.run import ended_by, explain_end, load_on_host

TIMEOUT_SECONDS = 60
"""The longest that anything waits for other ranks; `cluster.collective_timeout_seconds` where that is less."""
JOIN_SECONDS = 300
"""How long a launcher may take from the first process to the last."""
OUTPUT = "preflight.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the cluster for what the command line describes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="preflight.py", description="Check every node and link before a long job.")
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where to write the numbers (RUN_FOLDER/{OUTPUT})")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    options = parser.parse_intermixed_args(arguments)
    return preflight(options.config, options.overrides, options.json)


def end_process(code: int) -> None:
    """End with `code`; after a failure at once, since leaving groups whose ranks are gone can wait for a timeout."""
    sys.stdout.flush()
    if code:
        os._exit(code)
    sys.exit(code)


def preflight(path: str, overrides: Sequence[str], output: Path | None) -> int:
    """Check the cluster on every rank that the launcher has started; returns the exit code, the same on all."""
    try:
        join_slurm()
        code = _check(load_on_host(path, overrides), output)
    except Exception as error:
        return ended_by(error)
    leave_processes()
    return code


def _check(given: Config, output: Path | None) -> int:
    begun = time.monotonic()
    world, config = launched_world(), given
    if given.cluster.elastic:
        config = fit_to_world(given, *world.shape(given.cluster.devices_per_node))
    else:
        world.check(given)
    facts = resolve_device(config.cluster.device)
    on_cpu = facts is not None and facts.name == "cpu"
    rank = join_processes("cpu" if on_cpu else "cuda", timedelta(seconds=JOIN_SECONDS), config.cluster.interface)
    quiet_deepspeed()
    timeout = timedelta(seconds=min(TIMEOUT_SECONDS, config.cluster.collective_timeout_seconds))
    set_timeout_everywhere(timeout)
    if not on_cpu:
        process_watch().end_stalls(_end_stalled)
    checks = Preflight(config, rank, run_folder(config), timeout)
    checks.run()

    def conclude(verdict: Verdict, reports: Sequence[RankReport]) -> int:
        seconds = time.monotonic() - begun
        file = output or run_folder(config) / OUTPUT
        try:
            write_json(file, config, verdict, reports, seconds)
        except OSError as error:
            verdict.say(f"cannot write {file.absolute()}: {error.strerror}", serious=False)
        print(f"\n{text(config, verdict, reports, seconds)}", flush=True)
        return verdict.exit_code

    return checks.end(conclude)


def _end_stalled(error: LostRanksError) -> None:
    """End this process from a thread, because the main one waits for a device that waits for ever."""
    explain_end(error, str(error))
    os._exit(1)
