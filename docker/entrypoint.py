"""What the image runs: `pretrain CONFIG [section.key=value ...]` on this node's devices, or any other command.

Which ranks it starts, by what it sees in the environment:

    RANK and WORLD_SIZE, srun's step,      this process is one rank, that another launcher has started
    or mpirun's variables
    NODE_RANK, or JOB_COMPLETION_INDEX     one rank per device of this node, of NNODES nodes; the first is MASTER_ADDR
    none of them                           one rank per device of this machine, which is the only one

`pretrain` is any program in launch/. The ranks' exit codes and signals are why this is neither `torchrun` nor
`deepspeed`: both exit with 1 where the ranks, told to stop, have saved a checkpoint and exited with 75, and both kill
the ranks 30 seconds after a signal, however long the checkpoint takes.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from dsmoe.config import Config, UserError, load_config
from dsmoe.exit_codes import DONE, NO_PROGRAM, STOPPED, USER_ERROR, of_signal
from dsmoe.runtime.launchers import find_task
from dsmoe.runtime.variables import whole_number

LAUNCH = Path(__file__).parents[1] / "launch"
RANKS_OF_OTHERS = ({"RANK", "WORLD_SIZE"}, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"})
"""What a launcher's rank has in its environment; a batch script of Slurm has no SLURM_STEP_NUM_TASKS."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT)
"""What is handed on. A terminal that has gone (SIGHUP) is SIGTERM to the ranks."""
GRACE_SECONDS = 30.0
"""How long the other ranks may take to say what they saw, after one has failed."""


def _is_rank_of_another() -> bool:
    """Whether another launcher has started this process as one of several."""
    if any(keys <= os.environ.keys() for keys in RANKS_OF_OTHERS):
        return True
    try:
        task = find_task(os.environ)
    except UserError:
        return True  # the program says what is wrong with the launcher's variables
    return task is not None and task.size > 1


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code, unless it replaces this process."""
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
    if _is_rank_of_another():
        _become(command)
    try:
        ranks = environments(_config(rest), os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return supervise(command, ranks)


def environments(config: Config, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What each rank of this node has in its environment besides `environment`, in the order of their devices.

    Raises:
        UserError: it does not say which node this is, or where the first one is.
    """
    number = partial(whole_number, environment, advice="set NNODES, NODE_RANK and MASTER_ADDR for each container")
    nodes = number("NNODES") if "NNODES" in environment else config.cluster.nodes
    if not nodes:
        raise UserError("NNODES must be a number of nodes, from 1 on")
    devices = _devices(config)
    name = next((key for key in ("NODE_RANK", "JOB_COMPLETION_INDEX") if key in environment), None)
    if nodes == 1 and name is None:
        address, port, node = "127.0.0.1", environment.get("MASTER_PORT") or _free_port(), 0
    elif name is None or "MASTER_ADDR" not in environment:
        raise UserError(
            f"this container is one of {nodes} nodes (cluster.nodes, NNODES) and is not told which: set NODE_RANK "
            f"(0 to {nodes - 1}; Kubernetes sets JOB_COMPLETION_INDEX) and MASTER_ADDR, the name of the first; "
            "for this machine alone add cluster.nodes=1"
        )
    else:
        address, port = environment["MASTER_ADDR"], environment.get("MASTER_PORT") or "29500"
        node = number(name)
        if node >= nodes:
            raise UserError(f"{name} ({node}) must be below the number of nodes (cluster.nodes, NNODES: {nodes})")
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(nodes * devices),
        "LOCAL_WORLD_SIZE": str(devices),
        # More threads than cores make ranks many times slower; torchrun has the same default.
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
    }
    if config.cluster.device == "cpu":
        shared["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no other
    return [{**shared, "RANK": str(node * devices + device), "LOCAL_RANK": str(device)} for device in range(devices)]


def supervise(command: Sequence[str], ranks: Sequence[Mapping[str, str]]) -> int:
    """Run the ranks, hand on signals, end the others when one fails; returns the exit code of the node.

    That is the first failure's (128 + n for signal n), else 75 if the ranks have stopped for a signal, else 0.
    """
    # In a process group each: Control-C in a terminal then reaches them once, from here.
    processes = [subprocess.Popen(command, env={**os.environ, **rank}, process_group=0) for rank in ranks]

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (*SIGNALS, signal.SIGHUP):
        signal.signal(number, hand_on)
    failure, deadline = 0, math.inf
    while None in [process.poll() for process in processes]:
        if not failure and (failed := _failed(processes)) is not None:
            failure, how = _ending(processes[failed].returncode)
            rank = ranks[failed]["RANK"]
            print(f"rank {rank} {how}; the other ranks of this node are told to stop", file=sys.stderr, flush=True)
            hand_on(signal.SIGTERM, None)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            hand_on(signal.SIGKILL, None)
        time.sleep(0.1)
    if not failure and (failed := _failed(processes)) is not None:
        return _ending(processes[failed].returncode)[0]
    return failure or max(process.returncode for process in processes)


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Which rank of this node has failed; None if none has."""
    return next((i for i, process in enumerate(processes) if process.returncode not in (None, DONE, STOPPED)), None)


def _ending(code: int) -> tuple[int, str]:
    """The exit code that stands for a process' return code, and what that says, which a killed rank cannot."""
    if code < 0:
        return of_signal(-code), f"was killed by {signal.Signals(-code).name}"
    return code, f"has ended with exit code {code}"


def _become(command: list[str]) -> None:
    """Replace this process, so that the command gets the container's signals and its code is the container's."""
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


def _devices(config: Config) -> int:
    """How many ranks this node has: the config's, or where that is elastic all the GPUs that there are."""
    if not config.cluster.elastic or config.cluster.device == "cpu":
        return config.cluster.devices_per_node
    import torch

    return torch.cuda.device_count() or config.cluster.devices_per_node


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
