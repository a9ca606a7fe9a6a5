"""Nodes in containers: as Kubernetes starts them, and in real containers of the image, which is built here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import Cluster, Host, Task, missing
from tests.cluster.launching import ENVIRONMENT, PRETRAIN, REPOSITORY, losses, write_config


def start_pod(host: Host, index: int, first: Host, config: Path) -> Task:
    """Start the image's entry point with what a pod of the manifest has in its environment, and write down its id."""
    _, job = yaml.safe_load_all((REPOSITORY / "docker" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [variable["name"] for variable in container["env"]] == ["MASTER_ADDR"]
    command = [sys.executable, str(REPOSITORY / "docker" / "entrypoint.py"), container["args"][0], str(config)]
    environment = {**ENVIRONMENT, "JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": first.name}
    return host.start(["sh", "-c", f'echo $$ > pod{index}; exec "$@"', "sh", *command], environment, config.parent)


@pytest.mark.cluster
@pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")
def test_pods_stop_together_and_go_on(tmp_path: Path) -> None:
    train = {"steps": 60}
    alone = tmp_path / "alone"
    alone.mkdir()
    command = [sys.executable, str(PRETRAIN), "--config", str(write_config(alone, 1, 1, train=train))]
    subprocess.run(command, cwd=alone, env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}, check=True)
    config = write_config(tmp_path, 2, 2, train=train)
    with Cluster(2) as cluster:
        first, second = cluster
        pods = [start_pod(host, index, first, config) for index, host in enumerate(cluster)]
        pods[0].wait_for("step 3/", 120)
        second.run(["kill", "-TERM", (tmp_path / "pod1").read_text().strip()])
        stopped = [pod.wait(60) for pod in pods]
        assert [outcome.code for outcome in stopped] == [75, 75], stopped[0].output + stopped[1].output
        pods = [start_pod(host, index, first, config) for index, host in enumerate(cluster)]
        finished = [pod.wait(120) for pod in pods]
    assert [outcome.code for outcome in finished] == [0, 0], finished[0].output + finished[1].output
    assert "continuing from" in finished[0].output
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
