"""A run over ssh: the hostfile and the environment that `deepspeed` takes to its hosts."""

from __future__ import annotations

import sys

from dsmoe.launch.job import Job, Request


def job(request: Request) -> Job:
    """A hostfile and a file of environment variables."""
    cluster = request.config.cluster
    lines = [f"node{number:02d} slots={cluster.devices_per_node}\n" for number in range(1, cluster.nodes + 1)]
    files = {"hostfile": "".join(lines), "deepspeed_env": f"PATH={sys.prefix}/bin:$PATH\nOMP_NUM_THREADS=1\n"}
    hostfile, environment = request.path_of("hostfile"), request.path_of("deepspeed_env")
    return Job(
        files, f"DS_ENV_FILE={environment} deepspeed --hostfile {hostfile} launch/pretrain.py {request.arguments}"
    )
