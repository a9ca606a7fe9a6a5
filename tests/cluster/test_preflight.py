"""Preflight on emulated hosts: a healthy cluster passes; a slow link, a dead host and another version are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.emulated_hosts import Cluster, missing
from tests.helpers.launching import REPOSITORY, pdsh, torchrun, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")]

PREFLIGHT = REPOSITORY / "launch" / "preflight.py"
OTHER_TORCH = """
import os
from dsmoe.runtime.start import exit_process
from dsmoe.preflight import check_nodes, stages

truth = stages.versions
if os.environ["RANK"] == "2":
    stages.versions = lambda *where: {**truth(*where), "torch": "2.9.0"}
exit_process(check_nodes.main())
"""


def small(folder: Path, hosts: int, **cluster: object) -> Path:
    """A config of one rank per host."""
    return write_config(
        folder,
        hosts,
        1,
        cluster={"collective_timeout_seconds": 20, **cluster},
        moe={"num_experts": hosts},
        train={"steps": 3, "batch_tokens": hosts * 32},
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "runs" / "small" / "preflight.json").read_text(encoding="utf-8"))


def test_a_healthy_pair_passes(tmp_path: Path) -> None:
    config = small(tmp_path, 2)
    with Cluster(2) as cluster:
        (task,) = pdsh(cluster, tmp_path, 1, str(PREFLIGHT), "--config", str(config))
        outcome = task.wait(120)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("all fine") == 1
    assert [rank["host"] for rank in results(tmp_path)["ranks"]] == ["host0", "host1"]
    assert results(tmp_path)["cluster"]["inter_node_gbps"] > 0.02


def test_a_slow_link_and_another_version_are_named(tmp_path: Path) -> None:
    config = small(tmp_path, 3, inter_node_gbps=0.05)
    (tmp_path / "program.py").write_text(OTHER_TORCH, encoding="utf-8")
    with Cluster(3) as cluster:
        cluster.hosts[1].shape("100mbit")
        outcomes = [task.wait(120) for task in torchrun(cluster, tmp_path, 1, "program.py", "--config", str(config))]
    output = outcomes[0].output
    assert {outcome.code for outcome in outcomes} == {1}, output
    version, link = (finding["text"] for finding in results(tmp_path)["findings"] if finding["serious"])
    assert version.startswith("torch differs: 2.9.0 on host2 (rank 2); 2.")
    assert version.endswith(" on host0 (rank 0) and host1 (rank 1)")
    assert re.match(r"link between nodes: 0\.0\d+ GB/s at best on host1 \(rank 1\), 0\.0\d+ x the median ", link)
    assert f"PROBLEM  {version}" in output
    assert f"PROBLEM  {link}" in output
    assert "# measured; was 0.05" in output


def test_a_host_that_dies_is_named(tmp_path: Path) -> None:
    config = small(tmp_path, 2, collective_timeout_seconds=6)
    with Cluster(2) as cluster:
        first, _ = torchrun(cluster, tmp_path, 1, str(PREFLIGHT), "--config", str(config))
        first.wait_for("2/5 ", 100)
        cluster.hosts[1].kill()
        outcome = first.wait(60)
    assert outcome.code == 1
    assert outcome.output.count("a collective failed at step ") == 1, outcome.output
    assert "rank 1 on host1 is gone" in outcome.output
