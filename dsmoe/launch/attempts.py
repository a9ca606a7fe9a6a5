"""Attempts of a Slurm job, and whether to queue it again: `python -m dsmoe.launch.attempts RUN_FOLDER EXIT_CODE`.

A job script runs this after every attempt and goes by the exit code: 0, queue the job again; 1, leave it. A run that
fails without progress must not occupy the cluster for ever: after `MOST_FAILURES` such attempts the job is left, with a
message. So is a job whose attempts are, as many times, told to stop so early that there is nothing to save. Submitted
again, as a new job, it has as many attempts again.

With the standard library alone, as are the modules imported here: in a job that runs in containers, the script's own
Python has no packages.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsmoe.exit_codes import DONE, FAILED, STOPPED, USER_ERROR, of_signal
from dsmoe.metrics.definitions import OPTIM_SKIPPED_STEPS
from dsmoe.runtime.atomic_files import write_whole
from dsmoe.runtime.rendezvous import slurm_attempt

MOST_FAILURES = 3
"""The number of failed attempts after which a job without progress is left."""
STATE = "attempts.json"
"""The file in the run's folder with the counts of attempts."""

QUEUE_AGAIN, LEAVE = DONE, FAILED
"""Exit codes of this module."""
_STOPPED_EARLY = tuple(map(of_signal, (signal.SIGUSR1, signal.SIGTERM)))
"""Exit codes of ranks that were told to stop while they started, without a handler: Python died of the signal."""
_TAIL_BYTES = 1 << 20


def should_requeue(folder: Path, code: int, job: str) -> tuple[bool, str]:
    """Return whether to queue `job` again after exit code `code`, and why.

    Args:
        folder: the run's folder.
        code: the highest of the ranks' exit codes, as srun returns it.
        job: the job's number; attempts of one job are counted together.
    """
    # A run that saves every 100 steps, diverges at step 250, and ends with 1 (MOST_FAILURES = 3):
    #   attempt 1: 250 steps, checkpoint 200    further than before: failure 1, again
    #   attempt 2: 250 steps, checkpoint 200    no further: failure 2, again
    #   attempt 3: the same                     failure 3: left
    # Had attempt 3 reached 350 steps and checkpoint 300, the count would start at 1 again.
    if code == DONE:
        return False, "done"
    if code == USER_ERROR:
        return (
            False,
            f"exit code {USER_ERROR}: something has to be put right first (see the error above, or in the logs)",
        )
    before, saved = _read(folder / STATE, job), newest_checkpoint(folder)
    now = replace(before, saved=max(saved, before.saved))
    if code == STOPPED or code in _STOPPED_EARLY:
        now = replace(now, stops=before.stops + 1 if saved <= before.saved else 0)
        again, why = now.stops < MOST_FAILURES, f"exit code {code}: the ranks were told to stop"
        if not again:
            why += (
                f"; so were those of {MOST_FAILURES} attempts before they had a step to save, and none is made again. "
                f"Give it more time (--time), or less to save (--signal)"
            )
    else:
        reached = steps_taken(folder)
        is_further = (reached is None or reached > before.steps_done) and saved > before.saved
        failures = 1 if is_further else before.failures + 1
        now = replace(now, failures=failures, steps_done=max(reached or 0, before.steps_done))
        again = failures < MOST_FAILURES
        why = f"exit code {code}: failure {failures} of {MOST_FAILURES} (steps done: {now.steps_done})"
        if not again:
            why += "; no attempt got further, so none is made again. Submit the job anew to try it once more"
    _write(folder / STATE, now)
    return again, why


@dataclass(frozen=True)
class Attempts:
    """The counts of a job's attempts, as in `STATE`."""

    job: str
    failures: int = 0
    """The failed attempts since one got further: to more steps than before, and to a newer checkpoint."""
    steps_done: int = -1
    """The most steps that an attempt has done."""
    stops: int = 0
    """The attempts in a row that were told to stop before they had saved a newer checkpoint."""
    saved: int = -1
    """The step of the newest checkpoint."""


def newest_checkpoint(folder: Path) -> int:
    """Return the step of the newest checkpoint, by its name; 0 if there is none."""
    names = [path.name[len("step_") :] for path in folder.glob("checkpoints/step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def steps_taken(folder: Path) -> int | None:
    """Return the optimizer steps that have changed the weights, by the last line of metrics; 0 if there is none yet.

    None if that is unknown, and only checkpoints tell how far the run is: the metrics or their lines cannot be read, or
    they are missing although the run has saved (it trains on if it cannot write them, or if they are removed).

    Skipped steps do not count: a diverged run advances by them, from each checkpoint to the next failure.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    except OSError:
        return None
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
            return int(metrics["step"] - metrics[OPTIM_SKIPPED_STEPS.name])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # an evaluation's line; or cut off, by the end of a rank or as the first line of the tail
    return None if lines or newest_checkpoint(folder) else 0


def _read(path: Path, job: str) -> Attempts:
    """The counts of this job; zero if the file is another job's or cannot be read."""
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
        if counts.pop("job") == job:
            return Attempts(job, **{name: int(number) for name, number in counts.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    return Attempts(job)


def _write(path: Path, attempts: Attempts) -> None:
    write_whole(path, json.dumps(asdict(attempts)) + "\n")


def main() -> int:
    """Print the reason, and return 0 to queue the job again, 1 to leave it."""
    folder, code = sys.argv[1:]
    job, restarts = slurm_attempt()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name, or a variable, may be no valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        again, why = should_requeue(Path(folder), int(code), job)
    except OSError as error:  # a full disk, say: Slurm's count of restarts decides
        again = re.fullmatch(r"[0-9]{1,9}", restarts) is not None and int(restarts) < MOST_FAILURES
        then = "tried again, as Slurm has not often" if again else "not tried again"
        said = f"SLURM_RESTART_COUNT is {restarts[:20]}"
        why = f"exit code {code}, and {error.filename}: {error.strerror}; {then} ({said})"
    print(why, flush=True)
    return QUEUE_AGAIN if again else LEAVE


if __name__ == "__main__":
    sys.exit(main())
