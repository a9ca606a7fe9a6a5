"""Train a small model on the hosts of a cluster, through the launchers that users have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dsmoe.config import dump_config
from tests.helpers.emulated_hosts import CABLE, SYSTEM_PATH, Cluster, Task
from tests.helpers.small_runs import small_config

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
PORT = "29500"
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": CABLE,
}


def write_config(folder: Path, hosts: int, ranks_per_host: int, **sections: object) -> Path:
    """A config of `hosts` x `ranks_per_host` ranks, with experts spread over all of them; trains in a second."""
    ranks = hosts * ranks_per_host
    cluster = {"nodes": hosts, "devices_per_node": ranks_per_host, "collective_timeout_seconds": 60}
    sections = {"train": {"steps": 3}, "runs_dir": "runs", **sections}
    sections["cluster"] = {**cluster, **sections.get("cluster", {})}  # type: ignore[dict-item]
    path = folder / f"config_{ranks}.yaml"
    path.write_text(
        dump_config(small_config(folder, ranks=ranks_per_host, expert=min(ranks, 4), **sections)), encoding="utf-8"
    )  # type: ignore[arg-type]
    return path


def pdsh(cluster: Cluster, folder: Path, ranks_per_host: int, *arguments: str) -> list[Task]:
    """`deepspeed --hostfile` on the first host, which reaches the others by ssh."""
    _write_hostfile(cluster, folder, ranks_per_host)
    # ssh hands on no environment: DeepSpeed writes this file's lines into the command.
    (folder / "environment").write_text(
        "".join(f"{key}={value}\n" for key, value in ENVIRONMENT.items()), encoding="utf-8"
    )
    environment = {**ENVIRONMENT, "DS_ENV_FILE": str(folder / "environment")}
    command = ["deepspeed", "--hostfile", "hostfile", "--launcher", "pdsh", "--master_port", PORT, *arguments]
    return [cluster.hosts[0].start(command, environment, folder)]


def no_ssh(cluster: Cluster, folder: Path, ranks_per_host: int, *arguments: str) -> list[Task]:
    """`deepspeed --no_ssh --node_rank K` on every host, as a job script starts it."""
    _write_hostfile(cluster, folder, ranks_per_host)
    first = cluster.hosts[0].address
    command = ["deepspeed", "--hostfile", "hostfile", "--no_ssh", "--master_addr", first, "--master_port", PORT]
    return [
        host.start([*command, "--node_rank", str(number), *arguments], ENVIRONMENT, folder)
        for number, host in enumerate(cluster)
    ]


def torchrun(cluster: Cluster, folder: Path, ranks_per_host: int, *arguments: str) -> list[Task]:
    """`torchrun --node-rank K` on every host."""
    size = ["--nnodes", str(len(cluster.hosts)), "--nproc-per-node", str(ranks_per_host)]
    command = ["torchrun", *size, "--master-addr", cluster.hosts[0].address, "--master-port", PORT]
    return [
        host.start([*command, "--node-rank", str(number), *arguments], ENVIRONMENT, folder)
        for number, host in enumerate(cluster)
    ]


LAUNCHERS = {"pdsh": pdsh, "no_ssh": no_ssh, "torchrun": torchrun}


def losses(folder: Path, name: str = "small") -> list[float]:
    """The training losses that a run has written, by step."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def _write_hostfile(cluster: Cluster, folder: Path, ranks_per_host: int) -> None:
    (folder / "hostfile").write_text(
        "".join(f"{host.name} slots={ranks_per_host}\n" for host in cluster), encoding="utf-8"
    )
