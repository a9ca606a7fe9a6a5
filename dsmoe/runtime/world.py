"""The processes that a launcher has started, by what it says in their environment: how many, where, and who it was.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` and the launchers
of `dsmoe.runtime.launchers` they are filled in here. Whatever cannot be read is refused: it would become as many runs
of one rank, in one folder. Without torch, so that whatever asks is answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

from dsmoe.config.errors import Problem, UserError
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.schema import Config
from dsmoe.plan.elastic import fit_to_world, has_layout, is_sound, settings_for
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import quantity
from dsmoe.runtime.launchers import (
    FIRST_PORT,
    NUM_PORTS,
    find_task,
    join_task,
    launcher_named,
    tasks_agreeing,
)
from dsmoe.runtime.nodelist import expand
from dsmoe.runtime.rendezvous import is_whole_number
from dsmoe.runtime.variables import (
    WANTED,
    LauncherError,
    check_address,
    how_to_start,
    shown,
    whole_number,
)

ALONE, DEEPSPEED, TORCHRUN, SRUN, OTHER = "python alone", "deepspeed", "torchrun", "srun", "the launcher"
_PORTS_APART = 1_009  # of two attempts of a job, so that jobs of near numbers keep apart


@dataclass(frozen=True)
class World:
    """The ranks that were started; node by node, each with equally many."""

    size: int
    devices_per_node: int | None
    """None where the launcher does not say."""
    launcher: str

    def shape(self, devices_per_node: int) -> tuple[int, int]:
        """Nodes, and ranks on each. Where the launcher does not say, nodes have `devices_per_node` if that divides."""
        per_node = self.devices_per_node or (self.size if self.size % devices_per_node else devices_per_node)
        return self.size // per_node, per_node

    def problem(self, config: Config) -> str | None:
        """Why these are not the ranks that the config describes, how to start those, and how to train on these.

        None where they are. Of a config some of whose keys are wrong, what else would be wrong on these is not known.
        """
        nodes, devices = config.cluster.nodes, config.cluster.devices_per_node
        started = self.shape(devices)
        if started == (nodes, devices):
            return None
        problem = (
            f"{self.launcher} started {_ranks(*started)}, but cluster.nodes x cluster.devices_per_node is "
            f"{_ranks(nodes, devices)}; start those with {self._start(nodes, devices)}"
        )
        with suppress(InvalidKeyError):
            settings, others = settings_for(config, *started)
            if others:
                takes = f"it takes {' '.join(settings)}, and this has to change as well: {'; '.join(others)}"
                return f"{problem}. What was started cannot train this config: {takes}"
            elastic = ", or cluster.elastic=true" if has_layout(config) else ""
            rest = "" if is_sound(config) else "when the rest is mended, "
            return f"{problem}, or {rest}train on what was started with {' '.join(settings)}{elastic}"
        return problem

    def _start(self, nodes: int, devices: int) -> str:
        """The command that starts so many ranks by the same launcher."""
        if self.launcher == SRUN or (self.launcher == ALONE and "SLURM_JOB_ID" in os.environ):
            return f"srun --nodes {nodes} --ntasks-per-node {devices}"
        if self.launcher == TORCHRUN:
            return f"torchrun --nnodes {nodes} --nproc-per-node {devices}"
        if self.launcher == OTHER:
            return f"{devices} processes on each of {quantity(nodes, 'node')}"
        launcher = launcher_named(self.launcher)
        if launcher is not None:
            return launcher.command(nodes, devices)
        if nodes == 1:
            return f"deepspeed --num_gpus {devices}"
        return f"deepspeed --hostfile and {nodes} lines of `HOST slots={devices}` (see dsmoe launch CONFIG --hostfile)"


def for_this_world(config: Config) -> Config:
    """The config on the ranks that the launcher started: another where it is elastic, else it must be theirs.

    Raises:
        UserError: it cannot be trained on them.
    """
    world = launched_world()
    if config.cluster.elastic:
        return fit_to_world(config, *world.shape(config.cluster.devices_per_node))
    problem = world.problem(config)
    if problem is not None:
        raise UserError(problem)
    return config


def launched_plan(given: Config) -> Plan:
    """The plan of a config on the ranks that the launcher started.

    Raises:
        UserError: it cannot be trained on them.
    """
    return Plan.from_config(for_this_world(given), given)


def world_problems(config: Config) -> list[Problem]:
    """What `for_this_world` would say, for `load_config`, of a config that may have keys that are wrong.

    Raises:
        LauncherError: what the launcher says cannot be, which other ranks may not have.
    """
    try:
        for_this_world(config)
    except InvalidKeyError:
        return []
    except LauncherError:
        raise
    except UserError as error:
        return [("cluster.nodes", str(error))]
    return []


def launched_world(environment: Mapping[str, str] = os.environ) -> World:
    """What the launcher of this process has started; a world of one without a launcher.

    Raises:
        UserError: nodes have different numbers of ranks, or variables are missing or contradict each other.
    """
    if "RANK" not in environment:
        task = find_task(environment)
        return World(1, 1, task.launcher.name if task is not None else ALONE)
    size = whole_number(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1
    launcher = _launcher(environment)
    local_name = _local_size_name(environment)
    if local_name is None:
        return World(size, None, launcher)
    local = whole_number(environment, local_name)
    nodes_name = next((name for name in ("GROUP_WORLD_SIZE", "CROSS_SIZE") if environment.get(name)), None)
    nodes = whole_number(environment, nodes_name) if nodes_name else size // max(local, 1)
    if nodes * local != size:
        raise UserError(
            f"{launcher} started {quantity(size, 'rank')} on {quantity(nodes, 'node')}, {local} of them on this "
            "one; every node must have equally many"
        )
    return World(size, local, launcher)


def _local_size_name(environment: Mapping[str, str]) -> str | None:
    # torchrun says LOCAL_WORLD_SIZE and GROUP_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE and CROSS_SIZE.
    return next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), None)


def _launcher(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return TORCHRUN
    if "CROSS_SIZE" in environment:
        return DEEPSPEED
    if _is_task_of_that_rank(environment):
        return SRUN
    if environment["RANK"].isdecimal() and environment.get("WORLD_SIZE", "").isdecimal():
        for task in tasks_agreeing(environment, int(environment["RANK"]), int(environment["WORLD_SIZE"])):
            return task.launcher.name
    return OTHER


def _is_task_of_that_rank(environment: Mapping[str, str]) -> bool:
    """Whether srun's number of this process is its RANK, as `join_launcher` or a script has said."""
    with suppress(LauncherError):
        return environment["RANK"] == environment.get("SLURM_PROCID") and _is_task(environment)
    return False


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell a process its rank by the names that torch and DeepSpeed know, where its launcher has other names.

    RANK counts before all others: who has set it is the innermost launcher. Then one that has started several ranks of
    those in `dsmoe.runtime.launchers`, then `srun`; without any this process is alone, and nothing is changed.

    Raises:
        LauncherError: what a launcher says is not all that it takes, or cannot be.
        UserError: hosts have different numbers of ranks, or theirs are not consecutive.
    """
    if "RANK" in environment:
        _check_ranks(environment)
        return
    task = find_task(environment)
    is_srun = _is_task(environment)
    if task is not None and task.size > 1:
        same = (str(task.rank), str(task.size))
        if not (is_srun and same == (environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"])):
            join_task(environment, task)
            check_meeting(environment)
            return
    if is_srun:
        _join_slurm(environment)
        check_meeting(environment)
    elif task is None and environment.get("WORLD_SIZE") and whole_number(environment, "WORLD_SIZE") > 1:
        raise LauncherError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, and nothing says which of them this process is (RANK); unset "
            f"it to train on one rank, or {how_to_start()}"
        )


def agree_with_outer_launcher(local_rank: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let an outer mpirun say what the rank itself says: DeepSpeed's engine refuses two numbers on a host."""
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)


def launcher_has_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the store in which ranks meet is in torchrun's agent on rank 0's host, and not in rank 0's process."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # as torch decides it


def check_meeting(environment: Mapping[str, str] = os.environ) -> None:
    """Check that the ranks know where they meet; one alone may take any port, which is 0.

    Raises:
        LauncherError: they do not.
    """
    size = whole_number(environment, "WORLD_SIZE")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if absent:
        raise LauncherError(
            f"RANK is {environment['RANK']} of {size}, and {' and '.join(absent)} must say where rank 0 is: the same "
            "on all ranks, its host and a free port of it"
        )
    if not (size > 1) <= whole_number(environment, "MASTER_PORT") < 65536:
        raise LauncherError(f"MASTER_PORT is {environment['MASTER_PORT']}, and ports are from 1 to 65535")
    check_address(environment, "MASTER_ADDR")


def _check_ranks(environment: MutableMapping[str, str]) -> None:
    """Check what a launcher says by torch's names; fill in what follows from it.

    Raises:
        LauncherError: it is not all that it takes, or contradicts itself.
    """
    rank = whole_number(environment, "RANK")
    if "WORLD_SIZE" not in environment:
        raise LauncherError(
            f"RANK is {rank}, and WORLD_SIZE is not set; unset RANK to train on one rank, or {how_to_start()}"
        )
    size = whole_number(environment, "WORLD_SIZE")
    if rank >= size:
        raise LauncherError(
            f"RANK is {rank} and WORLD_SIZE is {size}: ranks are from 0 to {max(size - 1, 0)}; {how_to_start()}"
        )
    for task in tasks_agreeing(environment, rank, size):
        environment.setdefault("LOCAL_RANK", str(task.local_rank))
        if _local_size_name(environment) is None:
            environment["LOCAL_WORLD_SIZE"] = str(task.local_size)
    if _is_task_of_that_rank(environment):
        environment.setdefault("LOCAL_RANK", environment["SLURM_LOCALID"])
    if size == 1:
        environment.setdefault("LOCAL_RANK", "0")
        for variable, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
            environment[variable] = environment.get(variable) or value
    if "LOCAL_RANK" not in environment:
        raise LauncherError(
            f"RANK is {rank} of {size}, and LOCAL_RANK, the number of this process on its host, is not set (0, where a "
            f"host has one rank); a launcher sets {WANTED}"
        )
    local_rank = whole_number(environment, "LOCAL_RANK")
    name = _local_size_name(environment)
    if name is None:
        return
    local = whole_number(environment, name)
    if not local_rank < local <= size:
        raise LauncherError(
            f"LOCAL_RANK is {local_rank}, {name} is {local} and WORLD_SIZE is {size}, which cannot be; {how_to_start()}"
        )
    if size % local == 0 and rank % local != local_rank:
        raise LauncherError(
            f"RANK is {rank}, LOCAL_RANK is {local_rank} and {name} is {local}: the ranks of a host are to have "
            f"consecutive numbers, from a multiple of {local} on; {how_to_start()}"
        )


def _join_slurm(environment: MutableMapping[str, str]) -> None:
    """Tell a task of `srun` its rank. MASTER_ADDR and MASTER_PORT stay where they are set.

    Raises:
        UserError: nodes have different numbers of tasks, or those of a node do not have consecutive numbers.
    """
    # First of all the rank, by which it is known who reports what is wrong.
    environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"])
    per_node = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    tasks, first = _tasks_here(environment), whole_number(environment, "SLURM_NODEID") * per_node
    if len(tasks) != per_node or tasks != list(range(first, first + per_node)):
        raise UserError(
            f"srun started tasks {shown(environment['SLURM_GTIDS'])} (SLURM_GTIDS) on node "
            f"{environment['SLURM_NODEID']}, and a node's are to have consecutive numbers, by node; give it "
            "--distribution=block"
        )
    environment.update(WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"], LOCAL_WORLD_SIZE=str(per_node))
    if "MASTER_ADDR" not in environment:
        try:
            environment["MASTER_ADDR"] = expand(environment["SLURM_STEP_NODELIST"])[0]
        except UserError as error:
            raise LauncherError(f"SLURM_STEP_NODELIST: {error}; set MASTER_ADDR, the host of rank 0") from None
    # Another port for each attempt: that another program has one is no reason for all of them to fail.
    attempt = whole_number(environment, "SLURM_JOB_ID")
    if environment.get("SLURM_RESTART_COUNT"):
        advice = "unset it, which is the same as 0, or set MASTER_PORT"
        attempt += _PORTS_APART * whole_number(environment, "SLURM_RESTART_COUNT", advice)
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + attempt % NUM_PORTS))


_HAND_ON = f"hand all of Slurm's variables on to the program, or set {WANTED} for each task"
_OF_A_TASK = (
    *("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),
)


def _is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step, and no job's shell.

    A job that is submitted by a step's task inherits that step's variables, but its script is alone on its node, by
    SLURM_GTIDS, which Slurm sets for every process.

    Raises:
        LauncherError: it is one, and Slurm's variables are not all there, as in a container that has some of them.
    """
    if "SLURM_PROCID" not in environment:
        return False
    rank = whole_number(environment, "SLURM_PROCID")
    size = whole_number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else None
    if size == 1 or (size is None and rank == 0):
        return False
    has_layout = size is not None and {"SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE"} <= environment.keys()
    if has_layout and len(_tasks_here(environment)) not in _counts(environment["SLURM_STEP_TASKS_PER_NODE"]):
        return False
    absent = [name for name in ("SLURM_GTIDS", *_OF_A_TASK) if not environment.get(name)]
    if absent:
        raise LauncherError(
            f"SLURM_PROCID is {rank}, a task of srun among others, and {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not set; {_HAND_ON}"
        )
    for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"):
        whole_number(environment, name)
    if size is not None and rank >= size:
        raise LauncherError(
            f"SLURM_PROCID is {rank} and SLURM_STEP_NUM_TASKS is {size}: tasks are from 0 to {size - 1}"
        )
    return True


def _tasks_here(environment: Mapping[str, str]) -> list[int]:
    """The numbers of this node's tasks."""
    numbers = environment["SLURM_GTIDS"].split(",")
    if not all(map(is_whole_number, numbers)):
        raise LauncherError(f"SLURM_GTIDS is {shown(environment['SLURM_GTIDS'])}, and is to be like 0,1; {_HAND_ON}")
    return [int(number) for number in numbers]


def _tasks_per_node(text: str) -> int:
    counts = _counts(text)
    if len(counts) > 1:
        raise UserError(
            f"srun started different numbers of tasks on the nodes ({text}); give it --ntasks-per-node, the config's "
            "cluster.devices_per_node"
        )
    return counts.pop()


def _counts(text: str) -> set[int]:
    """Read `4(x2),1`, four on each of two nodes and one on the last: 4 and 1."""
    parts = [re.fullmatch(r"([0-9]{1,9})(\(x[0-9]{1,9}\))?", part) for part in text.split(",")]
    if not all(parts):
        raise LauncherError(f"SLURM_STEP_TASKS_PER_NODE is {shown(text)}, and is to be like 4(x2),1; {_HAND_ON}")
    return {int(part[1]) for part in parts if part}


def _ranks(nodes: int, devices: int) -> str:
    return f"{nodes} x {devices} = {quantity(nodes * devices, 'rank')}"
