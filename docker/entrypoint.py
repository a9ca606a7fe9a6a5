"""Entry point of the image: `pretrain CONFIG [section.key=value ...]` on this node's devices, or any other command.

The ranks that it starts, by the variables in the environment:

    RANK and WORLD_SIZE, srun's step,      none: this process is one rank, which another launcher has started
    or mpirun's variables
    NODE_RANK, or JOB_COMPLETION_INDEX     one rank per device of this node, of NNODES nodes; the first is MASTER_ADDR
    none of them                           one rank per device of this machine, which is the only one

`pretrain` is any program in launch/. Neither `torchrun` nor `deepspeed` does, because of exit codes and signals: both
exit with 1 where the ranks, told to stop, have saved a checkpoint and exited with 75, and both kill the ranks 30
seconds after a signal, however long the checkpoint takes.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dsmoe.config import Config, UserError, load_config
from dsmoe.exit_codes import DONE, NO_PROGRAM, STOPPED, USER_ERROR, of_signal
from dsmoe.runtime.container import is_launched_rank, rank_environments
from dsmoe.runtime.rendezvous import Rendezvous

LAUNCH = Path(__file__).parents[1] / "launch"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT)
"""Signals that are forwarded as they are. The end of a terminal (SIGHUP) becomes SIGTERM."""
GRACE_SECONDS = 30.0
"""The time that the other ranks have to report, after one has failed."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code, unless it replaces this process."""
    if not arguments or not arguments[0]:
        print("error: nothing to run; give `pretrain CONFIG [section.key=value ...]` or a command", file=sys.stderr)
        return USER_ERROR
    program, *rest = arguments
    script = LAUNCH / f"{program}.py"
    if not script.is_file():
        _become([program, *rest])
    if rest and not rest[0].startswith("-"):
        rest.insert(0, "--config")
    command = [sys.executable, str(script), *rest]
    if is_launched_rank():
        _become(command)
    try:
        ranks = rank_environments(_config(rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return supervise(command, ranks)


def supervise(command: Sequence[str], ranks: Sequence[Mapping[str, str]]) -> int:
    """Run the ranks, forward signals, end the others when one fails, and return the exit code of the node.

    That is the first failure's (128 + n for signal n), else 75 if the ranks have stopped for a signal, else 0.

    Args:
        command: the program and its arguments.
        ranks: the variables to set for each rank.
    """
    # In a process group each: Control-C in a terminal then reaches them once, from this process.
    processes = [subprocess.Popen(command, env={**os.environ, **rank}, process_group=0) for rank in ranks]

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (*SIGNALS, signal.SIGHUP):
        signal.signal(number, forward)
    failure, deadline = 0, math.inf
    while None in [process.poll() for process in processes]:
        if not failure and (failed := _failed(processes)) is not None:
            failure, how = _ending(processes[failed].returncode)
            rank = Rendezvous.from_environment(ranks[failed]).rank
            print(f"rank {rank} {how}; the other ranks of this node are told to stop", file=sys.stderr, flush=True)
            forward(signal.SIGTERM, None)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            forward(signal.SIGKILL, None)
        time.sleep(0.1)
    if not failure and (failed := _failed(processes)) is not None:
        return _ending(processes[failed].returncode)[0]
    return failure or max(process.returncode for process in processes)


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The index of a rank that has failed, None if none has."""
    return next((i for i, process in enumerate(processes) if process.returncode not in (None, DONE, STOPPED)), None)


def _ending(code: int) -> tuple[int, str]:
    """The exit code for a process' return code, and its text for a message, which a killed rank cannot print itself."""
    if code < 0:
        return of_signal(-code), f"was killed by {signal.Signals(-code).name}"
    return code, f"has ended with exit code {code}"


def _become(command: list[str]) -> None:
    """Replace this process by the command, which then gets the container's signals and gives its exit code."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(NO_PROGRAM)


def _config(arguments: Sequence[str]) -> Config:
    """The config that the command's arguments name, as launch/pretrain.py reads them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    options, _ = parser.parse_known_intermixed_args(arguments)
    return load_config(options.config, options.overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
