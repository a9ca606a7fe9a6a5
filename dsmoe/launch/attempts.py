"""Whether a job whose ranks have stopped is to be queued again: `python -m dsmoe.launch.attempts RUN_FOLDER EXIT_CODE`.

A job script asks after every attempt and goes by the exit code: 0, queue it again; 1, leave it. A run that fails and
has got no further is not to hold the cluster for ever: after `MOST_FAILURES` such attempts of a job it is left, with a
message that says so; and so is one that is told to stop so early, as many times, that there is nothing to save.
Whoever submits it again, as a new job, has as many attempts again.

With the standard library alone, which is all that the modules imported here have: in a job that runs in containers,
the script's own Python has no more.
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
"""So many attempts of a job may fail without one of them getting further than those before."""
STATE = "attempts.json"
"""In the run's folder: how many there have been."""

QUEUE_AGAIN, LEAVE = DONE, FAILED
"""Exit codes of this module's own."""
_STOPPED_EARLY = tuple(map(of_signal, (signal.SIGUSR1, signal.SIGTERM)))
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
    """What is known of a job's attempts so far."""

    job: str
    failures: int = 0
    """How many have failed since one got further: to more steps than before, and to a newer checkpoint."""
    steps_done: int = -1
    """The most that one has done."""
    stops: int = 0
    """How many were told to stop, one after the other, before there was a newer checkpoint."""
    saved: int = -1
    """The step of the newest checkpoint."""


def newest_checkpoint(folder: Path) -> int:
    """By its name, the step of the newest checkpoint; 0 where there is none."""
    names = [path.name[len("step_") :] for path in folder.glob("checkpoints/step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def steps_taken(folder: Path) -> int | None:
    """By the last line of metrics, the optimizer steps that have changed the weights; 0 where nothing was written yet.

    None where that is unknown, and checkpoints alone tell how far a run is: the metrics cannot be read, or no line of
    them, or there are none of a run that has saved (it trains on where it cannot write them, or where they are gone).

    Skipped steps do not count: a run that has diverged gets further by them, from each checkpoint to the next failure.
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
            continue  # an evaluation's; or cut off, by the end of a rank or as the first one of the tail
    return None if lines or newest_checkpoint(folder) else 0


def _read(path: Path, job: str) -> Attempts:
    """The attempts of this job; none where the file is another job's, or no such file."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("job") == job:
            return Attempts(job, **{name: int(number) for name, number in said.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    return Attempts(job)


def _write(path: Path, attempts: Attempts) -> None:
    write_whole(path, json.dumps(asdict(attempts)) + "\n")


def main() -> int:
    """Print why, and return whether: 0 to queue the job again, 1 to leave it."""
    folder, code = sys.argv[1:]
    job, restarts = slurm_attempt()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name, or a variable, may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        again, why = worth_another(Path(folder), int(code), job)
    except OSError as error:  # a full disk, say; attempts that cannot be counted here are counted by Slurm
        again = re.fullmatch(r"[0-9]{1,9}", restarts) is not None and int(restarts) < MOST_FAILURES
        then = "tried again, as Slurm has not often" if again else "not tried again"
        said = f"SLURM_RESTART_COUNT is {restarts[:20]}"
        why = f"exit code {code}, and {error.filename}: {error.strerror}; {then} ({said})"
    print(why, flush=True)
    return QUEUE_AGAIN if again else LEAVE


if __name__ == "__main__":
    sys.exit(main())
