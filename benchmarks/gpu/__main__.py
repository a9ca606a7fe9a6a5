"""Prove dsmoe on this machine's CUDA devices and measure it there, in a few minutes.

    python -m benchmarks.gpu [--minutes 9] [--only STAGE ...] [--out DIR]
    python -m benchmarks.gpu --device cpu --tiny       # a rehearsal of every stage, without a device
    python -m benchmarks.gpu --adopt FILE.json         # take a run's figures into the repository

Stages, in order of worth: right, layer, step, memory, preflight, tune. Each runs in a process of its own with its own
time limit and log; one that fails, hangs or is killed does not take the next with it, and what it had measured by then
is kept. At the end there is a table, and in the folder one JSON and one Markdown file with device, driver, versions and
command. Needs no network and no registry, and no compiler but the one that Triton needs (docs/gpu.md).

Exit codes: 0 every stage did all that it is for; 1 one did not; 2 the command line is wrong, or there is no device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.exit_codes import DONE, FAILED, USER_ERROR

try:
    from benchmarks.gpu.results import Outcome, Results, read_rows
    from benchmarks.gpu.stages import STAGES, Machine, time_limit
    from benchmarks.gpu.supervise import supervise
except ModuleNotFoundError as error:
    print(
        f"error: {sys.executable} has no {error.name}; docs/gpu.md says what is needed, and how to bring it",
        file=sys.stderr,
    )
    sys.exit(USER_ERROR)

ROOT = Path(__file__).parents[2]
FOUND_SECONDS = 120.0
"""How long a process may take to say what the machine is."""
LEFT_OUT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET", "DS_ACCELERATOR", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
LEFT_OUT_PREFIXES = ("GROUP_", "OMPI_", "PMI_", "PYTEST_", "ROLE_", "SLURM_", "TORCHELASTIC_")
"""Variables of a launcher, a test run or an image around this command, which stages would take for their own."""
LEAST_SECONDS = 5.0
"""With less than that left, a stage is not begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="for all stages together (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results and logs (default: runs/gpu)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="take a run's JSON into benchmarks/results, no more")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not (options.tiny or options.adopt):
        parser.error("--device cpu is a rehearsal, and the sizes are those of a GPU: add --tiny")
    try:
        if options.adopt:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # only files are read: DeepSpeed need not look for devices
            from benchmarks.gpu.adopt import adopt

            for line in adopt(options.adopt, ROOT):
                print(line)
            return DONE
        return _run(options, list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    begun = time.monotonic()
    folder = (options.out or ROOT / "runs" / "gpu").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = _environment(options.device)
    facts = _find_machine(options.device, arguments, environment)
    machine = Machine(options.device, facts["ranks"], facts["known_as"], options.tiny)
    results = Results(folder, facts, options.tiny)
    try:
        results.logs.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{results.logs} is there: another run began in this minute; begin again in the next"
        ) from None
    print(f"{facts['devices']} x {facts['hardware']}; results in {results.json_path}", flush=True)
    # SIGINT as well, which a shell lets its background commands ignore.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    try:
        for number, stage in enumerate(stages):
            left = options.minutes * 60 - (time.monotonic() - begun)
            limit = time_limit(stage, stages[number + 1 :], left)
            if limit < LEAST_SECONDS:
                results.add(Outcome(stage.name, "not begun", "no time was left", 0.0, limit))
                continue
            print(f"{stage.name}: at most {limit:.0f} s ...", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                rows = Path(scratch) / "rows"
                end = supervise(
                    stage.command(machine, rows, limit), results.logs / f"{stage.name}.log", limit, environment, ROOT
                )
                results.add(Outcome.judge(stage.name, end, *read_rows(rows), limit))
            print(f"{stage.name}: {results.outcomes[-1].sentence()}", flush=True)
            if end.word == "interrupted":
                break
    except KeyboardInterrupt:  # between two stages
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for stage in stages[len(results.outcomes) :]:
        results.add(Outcome(stage.name, "not begun", "interrupted", 0.0, 0.0))
    print(f"\n{results.table()}\n\nresults: {results.json_path}\n         {results.markdown_path}", flush=True)
    return DONE if all(outcome.is_done for outcome in results.outcomes) else FAILED


def _interrupt(*_: object) -> None:
    """End as at Ctrl-C: the stage is ended, and the table and the files have what there is."""
    raise KeyboardInterrupt


def _environment(device: str) -> dict[str, str]:
    """For every stage; on the CPU without the devices that may be there, and with Triton's interpreter."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in [name for name in environment if name in LEFT_OUT or name.startswith(LEFT_OUT_PREFIXES)]:
        del environment[name]
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    return environment


def _find_machine(device: str, arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Ask another process what the machine is: this one takes no memory of a device.

    Raises:
        ValueError: there is no device, or torch or dsmoe cannot be imported.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.machine", device, *arguments]
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=FOUND_SECONDS,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"torch found no device in {FOUND_SECONDS:.0f} s: does nvidia-smi answer?") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        hint = "; docs/gpu.md says what is needed, and how to bring it" if "No module named" in lines[-1] else ""
        raise ValueError(lines[-1].removeprefix("error: ") + hint)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
