"""The processes that a launcher has started, by what it says in their environment: how many, where, and who it was.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` they are filled
in here. Without torch, so that whatever asks is answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.launch.nodelist import expand
from dsmoe.plan.text import quantity

ALONE, DEEPSPEED, TORCHRUN, SRUN, OTHER = "python alone", "deepspeed", "torchrun", "srun", "the launcher"
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below 32768, where Linux begins to hand out ports
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

    def check(self, config: Config) -> None:
        """Check that these are the ranks that the config describes.

        Raises:
            UserError: they are not; says how to start those, and how to train on these.
        """
        nodes, devices = config.cluster.nodes, config.cluster.devices_per_node
        started = self.shape(devices)
        if started == (nodes, devices):
            return
        raise UserError(
            f"{self.launcher} started {_ranks(*started)}, but cluster.nodes x cluster.devices_per_node is "
            f"{_ranks(nodes, devices)}; start those with {self._start(nodes, devices)}, or train on what was started "
            f"with cluster.nodes={started[0]} cluster.devices_per_node={started[1]}, or cluster.elastic=true"
        )

    def _start(self, nodes: int, devices: int) -> str:
        """The command that starts so many ranks by the same launcher."""
        if self.launcher == SRUN or (self.launcher == ALONE and "SLURM_JOB_ID" in os.environ):
            return f"srun --nodes {nodes} --ntasks-per-node {devices}"
        if self.launcher == TORCHRUN:
            return f"torchrun --nnodes {nodes} --nproc-per-node {devices}"
        if self.launcher == OTHER:
            return f"{devices} processes on each of {quantity(nodes, 'node')}"
        if nodes == 1:
            return f"deepspeed --num_gpus {devices}"
        return f"deepspeed --hostfile and {nodes} lines of `HOST slots={devices}` (see dsmoe launch CONFIG --hostfile)"


def launched_world(environment: Mapping[str, str] = os.environ) -> World:
    """What the launcher of this process has started; a world of one without a launcher.

    Raises:
        UserError: nodes have different numbers of ranks.
    """
    if "RANK" not in environment:
        return World(1, 1, ALONE)
    size = int(environment.get("WORLD_SIZE", "1"))
    # torchrun says LOCAL_WORLD_SIZE and GROUP_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE and CROSS_SIZE.
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    launcher = _launcher(environment)
    if local is None:
        return World(size, None, launcher)
    nodes = environment.get("GROUP_WORLD_SIZE") or environment.get("CROSS_SIZE") or size // int(local)
    if int(nodes) * int(local) != size:
        raise UserError(
            f"{launcher} started {quantity(size, 'rank')} on {quantity(int(nodes), 'node')}, {local} of them on this "
            "one; every node must have equally many"
        )
    return World(size, int(local), launcher)


def _launcher(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return TORCHRUN
    if "CROSS_SIZE" in environment:
        return DEEPSPEED
    # `join_slurm` has given this process its number among the step's tasks.
    return SRUN if _is_task(environment) and environment["RANK"] == environment["SLURM_PROCID"] else OTHER


def join_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell a task of `srun` its rank, by the names that torch and DeepSpeed know; changes nothing anywhere else.

    Anywhere else: where another launcher has set RANK, and in the shell of a job (salloc, sbatch), which is not one of
    several tasks. MASTER_ADDR and MASTER_PORT stay where they are set.

    Raises:
        UserError: nodes have different numbers of tasks, or those of a node do not have consecutive numbers.
    """
    if "RANK" in environment or not _is_task(environment):
        return
    # First of all the rank, by which it is known who reports what is wrong.
    environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"])
    per_node = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    here, first = environment["SLURM_GTIDS"], int(environment["SLURM_NODEID"]) * per_node
    if here != ",".join(map(str, range(first, first + per_node))):
        raise UserError(
            f"srun started tasks {here} on node {environment['SLURM_NODEID']}, and a node's are to have consecutive "
            "numbers, by node; give it --distribution=block"
        )
    environment.update(WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"], LOCAL_WORLD_SIZE=str(per_node))
    environment.setdefault("MASTER_ADDR", expand(environment["SLURM_STEP_NODELIST"])[0])
    # Another port for each attempt: that another program has one is no reason for all of them to fail.
    number = int(environment["SLURM_JOB_ID"]) + _PORTS_APART * int(environment.get("SLURM_RESTART_COUNT", "0"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _NUM_PORTS))


def _is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step, and no job's shell.

    A job that is submitted by a step's task inherits that step's variables, but its script is alone on its node, by
    SLURM_GTIDS, which Slurm sets for every process.
    """
    if "SLURM_GTIDS" not in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return False
    on_this_node = len(environment["SLURM_GTIDS"].split(","))
    return on_this_node in _counts(environment["SLURM_STEP_TASKS_PER_NODE"])


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
    return {int(re.sub(r"\(x\d+\)", "", part)) for part in text.split(",")}


def _ranks(nodes: int, devices: int) -> str:
    return f"{nodes} x {devices} = {quantity(nodes * devices, 'rank')}"
