"""From the command line to a verdict: `deepspeed launch/preflight.py --config CONFIG [section.key=value ...]`.

Exit codes: 0 the cluster is fine; 1 a rank or link is far off, versions differ, or ranks are missing; 2 the user's
input is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from dsmoe.plan import Plan
from dsmoe.preflight.judge import Verdict
from dsmoe.preflight.report import text, write_json
from dsmoe.preflight.results import RankReport
from dsmoe.preflight.stages import Preflight
from dsmoe.runtime.failure_exit import exit_stalled, report_failure
from dsmoe.runtime.processes import join_processes, leave_processes, quiet_deepspeed, set_group_timeouts
from dsmoe.runtime.start import Start, begin, preflight_parser
from dsmoe.runtime.watchdog import process_watchdog
from dsmoe.train.run_folder import run_folder

TIMEOUT_SECONDS = 60
"""The longest that anything waits for other ranks; `cluster.collective_timeout_seconds` where that is less."""
JOIN_SECONDS = 300
"""Seconds that a launcher may take from the first process to the last."""
OUTPUT = "preflight.json"


def main(arguments: Sequence[str] | Start | None = None) -> int:
    """Check the cluster for what the command line, or launch/preflight.py, has read; returns the exit code."""
    start = arguments if isinstance(arguments, Start) else begin(preflight_parser(), arguments)
    if not isinstance(arguments, Start) and (code := start.ended()) is not None:
        return code
    return check_cluster(start, getattr(start.options, "json", None))


def check_cluster(start: Start, output: Path | None) -> int:
    """Check the cluster on every rank that the launcher has started; returns the exit code, the same on all."""
    try:
        code = _check(start.plan, output)
    except Exception as error:
        return report_failure(error)
    leave_processes()
    return code


def _check(plan: Plan, output: Path | None) -> int:
    begun = time.monotonic()
    config = plan.config
    rank = join_processes(plan.device_type, timedelta(seconds=JOIN_SECONDS), config.cluster.interface)
    quiet_deepspeed()
    timeout = min(timedelta(seconds=TIMEOUT_SECONDS), plan.collective_timeout)
    set_group_timeouts(timeout)
    if not plan.is_on_cpu:
        process_watchdog().watch_for_stalls(exit_stalled)
    checks = Preflight(plan, rank, run_folder(config), timeout)
    checks.run()

    def conclude(verdict: Verdict, reports: Sequence[RankReport]) -> int:
        seconds = time.monotonic() - begun
        file = output or run_folder(config) / OUTPUT
        try:
            write_json(file, plan, verdict, reports, seconds)
        except OSError as error:
            verdict.say(f"cannot write {file.absolute()}: {error.strerror}", serious=False)
        print(f"\n{text(plan, verdict, reports, seconds)}", flush=True)
        return verdict.exit_code

    return checks.end(conclude)
