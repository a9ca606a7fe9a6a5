"""World: the ranks that a launcher has started, by its variables in the environment: how many, on which nodes, by whom.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` and the launchers
of `dsmoe.runtime.launchers` they are filled in here. Variables that cannot be read are refused: else every process
would train alone, all in one folder. Without torch, for answers at once.
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
    find_launcher,
    find_task,
    matching_tasks,
    set_task_variables,
)
from dsmoe.runtime.nodelist import expand_nodelist
from dsmoe.runtime.rendezvous import is_whole_number
from dsmoe.runtime.variables import (
    RANK_VARIABLES,
    LauncherError,
    check_address,
    shown,
    start_advice,
    whole_number,
)

ALONE, DEEPSPEED, TORCHRUN, SRUN, OTHER = "python alone", "deepspeed", "torchrun", "srun", "the launcher"
_PORTS_APART = 1_009  # between two attempts of a job, so that jobs with close numbers have different ports


@dataclass(frozen=True)
class World:
    """The ranks that were started: equally many on every node."""

    size: int
    devices_per_node: int | None
    """None if the launcher does not say."""
    launcher: str

    def shape(self, devices_per_node: int) -> tuple[int, int]:
        """Return nodes, and ranks per node: if the launcher does not say, `devices_per_node` where it divides."""
        per_node = self.devices_per_node or (self.size if self.size % devices_per_node else devices_per_node)
        return self.size // per_node, per_node

    def problem(self, config: Config) -> str | None:
        """Return why the ranks are not those of the config, how to start those, and how to train on these.

        None if they are. For a config with wrong keys, the settings that these ranks need are left out.
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
        """The command that starts so many ranks, by the same launcher."""
        if self.launcher == SRUN or (self.launcher == ALONE and "SLURM_JOB_ID" in os.environ):
            return f"srun --nodes {nodes} --ntasks-per-node {devices}"
        if self.launcher == TORCHRUN:
            return f"torchrun --nnodes {nodes} --nproc-per-node {devices}"
        if self.launcher == OTHER:
            return f"{devices} processes on each of {quantity(nodes, 'node')}"
        launcher = find_launcher(self.launcher)
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
    """Return the error of `for_this_world` as problems for `load_config`, also for a config with wrong keys.

    Raises:
        LauncherError: the launcher's variables are wrong, which other ranks' need not be.
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
    """Return the ranks that the launcher of this process has started; one rank without a launcher.

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
    # torchrun sets LOCAL_WORLD_SIZE and GROUP_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE and CROSS_SIZE.
    return next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), None)


def _launcher(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return TORCHRUN
    if "CROSS_SIZE" in environment:
        return DEEPSPEED
    if _is_task_of_that_rank(environment):
        return SRUN
    if environment["RANK"].isdecimal() and environment.get("WORLD_SIZE", "").isdecimal():
        for task in matching_tasks(environment, int(environment["RANK"]), int(environment["WORLD_SIZE"])):
            return task.launcher.name
    return OTHER


def _is_task_of_that_rank(environment: Mapping[str, str]) -> bool:
    """Return whether RANK is srun's number of this process, set by `set_rank_variables` or by a script."""
    with suppress(LauncherError):
        return environment["RANK"] == environment.get("SLURM_PROCID") and _is_task(environment)
    return False


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torch and DeepSpeed (RANK, ...), if the launcher of this process has variables of its own.

    RANK takes precedence: the innermost launcher has set it. Then a launcher of `dsmoe.runtime.launchers` with several
    ranks, then `srun`. Without a launcher this process is alone, and nothing is set.

    Raises:
        LauncherError: a launcher's variables are incomplete or contradict each other.
        UserError: hosts have different numbers of ranks, or their ranks are not consecutive.
    """
    if "RANK" in environment:
        _check_ranks(environment)
        return
    task = find_task(environment)
    is_srun = _is_task(environment)
    if task is not None and task.size > 1:
        same = (str(task.rank), str(task.size))
        if not (is_srun and same == (environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"])):
            set_task_variables(environment, task)
            check_rendezvous(environment)
            return
    if is_srun:
        _set_slurm_variables(environment)
        check_rendezvous(environment)
    elif task is None and environment.get("WORLD_SIZE") and whole_number(environment, "WORLD_SIZE") > 1:
        raise LauncherError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, and nothing says which of them this process is (RANK); unset "
            f"it to train on one rank, or {start_advice()}"
        )


def override_outer_local_rank(local_rank: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set an outer mpirun's local rank to this rank's own: DeepSpeed's engine refuses two different ones."""
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)


def launcher_has_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the store is in torchrun's agent on rank 0's host, and not in rank 0's process."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # as torch decides it


def check_rendezvous(environment: Mapping[str, str] = os.environ) -> None:
    """Check MASTER_ADDR and MASTER_PORT; port 0 (any port) is for a single rank only.

    Raises:
        LauncherError: one of them is missing or cannot be.
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
    """Check the variables of torch, and fill in those that follow from others.

    Raises:
        LauncherError: they are incomplete or contradict each other.
    """
    # Ranks of a host are consecutive, from a multiple of their number on. 2 hosts x 4 ranks:
    #   host 0: RANK 0 1 2 3    host 1: RANK 4 5 6 7    LOCAL_RANK 0 1 2 3 on both: RANK % 4 == LOCAL_RANK
    # Dealt out over the hosts (0 2 4 6, 1 3 5 7), RANK 2 has LOCAL_RANK 1, and 2 % 4 != 1: refused.
    rank = whole_number(environment, "RANK")
    if "WORLD_SIZE" not in environment:
        raise LauncherError(
            f"RANK is {rank}, and WORLD_SIZE is not set; unset RANK to train on one rank, or {start_advice()}"
        )
    size = whole_number(environment, "WORLD_SIZE")
    if rank >= size:
        raise LauncherError(
            f"RANK is {rank} and WORLD_SIZE is {size}: ranks are from 0 to {max(size - 1, 0)}; {start_advice()}"
        )
    for task in matching_tasks(environment, rank, size):
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
            f"host has one rank); a launcher sets {RANK_VARIABLES}"
        )
    local_rank = whole_number(environment, "LOCAL_RANK")
    name = _local_size_name(environment)
    if name is None:
        return
    local = whole_number(environment, name)
    if not local_rank < local <= size:
        raise LauncherError(
            f"LOCAL_RANK is {local_rank}, {name} is {local} and WORLD_SIZE is {size}, which cannot be; {start_advice()}"
        )
    if size % local == 0 and rank % local != local_rank:
        raise LauncherError(
            f"RANK is {rank}, LOCAL_RANK is {local_rank} and {name} is {local}: the ranks of a host are to have "
            f"consecutive numbers, from a multiple of {local} on; {start_advice()}"
        )


def _set_slurm_variables(environment: MutableMapping[str, str]) -> None:
    """Set the variables of torch and DeepSpeed for a task of `srun`; MASTER_ADDR and MASTER_PORT are kept if set.

    Raises:
        UserError: nodes have different numbers of tasks, or a node's tasks are not consecutive.
    """
    # The rank first: it decides who reports an error.
    environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"])
    per_node = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    tasks, first = _tasks_of_node(environment), whole_number(environment, "SLURM_NODEID") * per_node
    if len(tasks) != per_node or tasks != list(range(first, first + per_node)):
        raise UserError(
            f"srun started tasks {shown(environment['SLURM_GTIDS'])} (SLURM_GTIDS) on node "
            f"{environment['SLURM_NODEID']}, and a node's are to have consecutive numbers, by node; give it "
            "--distribution=block"
        )
    environment.update(WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"], LOCAL_WORLD_SIZE=str(per_node))
    if "MASTER_ADDR" not in environment:
        try:
            environment["MASTER_ADDR"] = expand_nodelist(environment["SLURM_STEP_NODELIST"])[0]
        except UserError as error:
            raise LauncherError(f"SLURM_STEP_NODELIST: {error}; set MASTER_ADDR, the host of rank 0") from None
    # Another port for each attempt: one that another program has taken must not fail all of them.
    attempt = whole_number(environment, "SLURM_JOB_ID")
    if environment.get("SLURM_RESTART_COUNT"):
        advice = "unset it, which is the same as 0, or set MASTER_PORT"
        attempt += _PORTS_APART * whole_number(environment, "SLURM_RESTART_COUNT", advice)
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + attempt % NUM_PORTS))


_HAND_ON = f"hand all of Slurm's variables on to the program, or set {RANK_VARIABLES} for each task"
_OF_A_TASK = (
    *("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),
)


def _is_task(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several tasks of a step, and not a job's shell.

    A job that is submitted by a step's task inherits that step's variables, but its script is alone on its node, by
    SLURM_GTIDS, which Slurm sets for every process.

    Raises:
        LauncherError: it is a task, and some of Slurm's variables are missing, as in a container that gets only some.
    """
    if "SLURM_PROCID" not in environment:
        return False
    rank = whole_number(environment, "SLURM_PROCID")
    size = whole_number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else None
    if size == 1 or (size is None and rank == 0):
        return False
    has_layout = size is not None and {"SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE"} <= environment.keys()
    if has_layout and len(_tasks_of_node(environment)) not in _counts(environment["SLURM_STEP_TASKS_PER_NODE"]):
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


def _tasks_of_node(environment: Mapping[str, str]) -> list[int]:
    """The numbers of the tasks of this node."""
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
    """The different numbers of tasks per node: {4, 1} for `4(x2),1`, four on each of two nodes and one on the last."""
    parts = [re.fullmatch(r"([0-9]{1,9})(\(x[0-9]{1,9}\))?", part) for part in text.split(",")]
    if not all(parts):
        raise LauncherError(f"SLURM_STEP_TASKS_PER_NODE is {shown(text)}, and is to be like 4(x2),1; {_HAND_ON}")
    return {int(part[1]) for part in parts if part}


def _ranks(nodes: int, devices: int) -> str:
    return f"{nodes} x {devices} = {quantity(nodes * devices, 'rank')}"
