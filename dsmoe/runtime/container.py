"""Container node: the ranks that a container starts, by the variables that a user or Kubernetes sets for it.

NNODES, NODE_RANK (or JOB_COMPLETION_INDEX, of an indexed job of Kubernetes), MASTER_ADDR and MASTER_PORT. For
docker/entrypoint.py, which is the launcher there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import partial

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.runtime.launchers import find_task
from dsmoe.runtime.variables import whole_number

_LAUNCHED_RANK_VARIABLES = ({"RANK", "WORLD_SIZE"}, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"})
"""Variables of a rank that a launcher has started; a batch script of Slurm has no SLURM_STEP_NUM_TASKS."""


def is_launched_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether another launcher has started this process as one of several ranks."""
    if any(names <= environment.keys() for names in _LAUNCHED_RANK_VARIABLES):
        return True
    try:
        task = find_task(environment)
    except UserError:
        return True  # the program says what is wrong with the launcher's variables
    return task is not None and task.size > 1


def rank_environments(config: Config, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return the variables to set for each rank of this node, in the order of their devices.

    Raises:
        UserError: `environment` does not say which node this is, or where the first one is.
    """
    # NNODES=4, NODE_RANK=2, MASTER_ADDR=node0, and 2 devices per node:
    #   device 0  RANK=4  LOCAL_RANK=0    with WORLD_SIZE=8, LOCAL_WORLD_SIZE=2, MASTER_ADDR=node0, MASTER_PORT=29500
    #   device 1  RANK=5  LOCAL_RANK=1
    number = partial(whole_number, environment, advice="set NNODES, NODE_RANK and MASTER_ADDR for each container")
    nodes = number("NNODES") if "NNODES" in environment else config.cluster.nodes
    if not nodes:
        raise UserError("NNODES must be a number of nodes, from 1 on")
    devices = _num_devices(config)
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


def _num_devices(config: Config) -> int:
    """The number of ranks on this node: the config's, or all GPUs if the config is elastic."""
    if not config.cluster.elastic or config.cluster.device == "cpu":
        return config.cluster.devices_per_node
    import torch

    return torch.cuda.device_count() or config.cluster.devices_per_node


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
