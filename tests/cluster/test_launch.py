"""`launch/pretrain.py` over several hosts and each launcher trains as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.emulated_hosts import Cluster, missing
from tests.helpers.launching import ENVIRONMENT, LAUNCHERS, PRETRAIN, losses, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(PRETRAIN), "--config", str(write_config(folder, 1, 1))]
    subprocess.run(command, cwd=folder, env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}, check=True)
    return losses(folder)


@pytest.mark.parametrize(
    ("launcher", "hosts", "ranks_per_host"),
    [("pdsh", 2, 2), ("pdsh", 4, 1), ("no_ssh", 4, 1)],  # torchrun: test_launch_page.py,
)
def test_hosts_train_as_one_process_does(
    launcher: str, hosts: int, ranks_per_host: int, of_one_process: list[float], tmp_path: Path
) -> None:
    config = write_config(tmp_path, hosts, ranks_per_host)
    with Cluster(hosts) as cluster:
        tasks = LAUNCHERS[launcher](cluster, tmp_path, ranks_per_host, str(PRETRAIN), "--config", str(config))
        outcomes = [task.wait(250) for task in tasks]
    output = "\n".join(outcome.output for outcome in outcomes)
    assert {outcome.code for outcome in outcomes} == {0}, output
    assert output.count("step 3/3") == 1
    assert len(of_one_process) == 3
    assert losses(tmp_path) == pytest.approx(of_one_process, rel=1e-5)
    facts = json.loads((tmp_path / "runs" / "small" / "environment.json").read_text(encoding="utf-8"))
    ranks = {
        host.name: range(number * ranks_per_host, (number + 1) * ranks_per_host) for number, host in enumerate(cluster)
    }
    assert {name: host["ranks"] for name, host in facts["hosts"].items()} == {
        name: list(of) for name, of in ranks.items()
    }
    assert (facts["launcher"], facts["interfaces"]["eth0"][0]) == ("deepspeed", "10.77.0.1")
