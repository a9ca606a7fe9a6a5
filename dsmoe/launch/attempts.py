"""Whether a job whose ranks have stopped is to be queued again: `python -m dsmoe.launch.attempts RUN_FOLDER EXIT_CODE`.

A job script asks after every attempt and goes by the exit code: 0, queue it again; 1, leave it. A run that fails and
has got no further is not to hold the cluster for ever: after `MOST_FAILURES` such attempts of a job it is left, with a
message that says so. Whoever submits it again, as a new job, has as many attempts again.

With the standard library alone: in a job that runs in containers, the script's own Python has nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

MOST_FAILURES = 3
"""So many attempts of a job may fail without one of them getting further than those before."""
STATE = "attempts.json"
"""In the run's folder: how many there have been."""

DONE, USER_ERROR, STOPPED = 0, 2, 75
_STOPPED_EARLY = tuple(128 + number for number in (signal.SIGUSR1, signal.SIGTERM))
"""Of ranks that were told to stop before they listened, while they started: Python died of the signal."""
_TAIL_BYTES = 1 << 20


def worth_another(folder: Path, code: int, job: str) -> tuple[bool, str]:
    """Whether to queue `job` again, whose ranks have ended with exit code `code`, and why.

    Args:
        folder: the run's.
        code: the highest of the ranks' exit codes, as srun returns it.
        job: by which attempts are counted together.
    """
    if code == DONE:
        return False, "done"
    if code == USER_ERROR:
        return False, "exit code 2: something has to be put right first (see the error above, or in the logs)"
    if code == STOPPED or code in _STOPPED_EARLY:
        return True, f"exit code {code}: the ranks were told to stop"
    failures, furthest = _failures_before(folder, job)
    reached = steps_taken(folder)
    failures = failures + 1 if reached <= furthest else 1
    furthest = max(furthest, reached)
    _write(folder / STATE, {"job": job, "failures": failures, "steps_done": furthest})
    counted = f"exit code {code}: failure {failures} of {MOST_FAILURES} (steps done: {furthest})"
    if failures < MOST_FAILURES:
        return True, counted
    return False, f"{counted}; no attempt got further, so none is made again. Submit the job anew to try it once more"


def steps_taken(folder: Path) -> int:
    """By the last line of metrics, the optimizer steps that have changed the weights; 0 where there is none.

    Skipped steps do not count: a run that has diverged gets further by them, from each checkpoint to the next failure.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
            return int(metrics["step"] - metrics["optim/skipped_steps"])
        except (ValueError, KeyError, TypeError):
            continue  # an evaluation's; or cut off, by the end of a rank or as the first one of the tail
    return 0


def _failures_before(folder: Path, job: str) -> tuple[int, int]:
    """How many attempts of this job have failed at the furthest step, and which that is; -1 for none yet."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state["job"] == job:
            return int(state["failures"]), int(state["steps_done"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, -1


def _write(path: Path, state: dict[str, object]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(state) + "\n")
    partial.replace(path)


def main() -> int:
    """Print why, and return whether: 0 to queue the job again, 1 to leave it."""
    folder, code = sys.argv[1:]
    again, why = worth_another(Path(folder), int(code), os.environ["SLURM_JOB_ID"])
    print(why, flush=True)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
