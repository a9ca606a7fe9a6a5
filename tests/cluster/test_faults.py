"""Hosts that are cut off or die end the run on the others, which say who is missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsmoe.checkpoint.folder import all_checkpoints, verify
from tests.helpers.emulated_hosts import Cluster, missing
from tests.helpers.launching import LAUNCHERS, PRETRAIN, write_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}"),
    pytest.mark.timeout(600),
]

TIMEOUT = 20
TO_SAY_SO = 60
"""Seconds for finding out who is missing (6), launchers to end their processes (up to 30 for those that hang) and pdsh
to give up a host (10), on a machine that has other things to do."""
FOREVER = {"train": {"steps": 1_000_000}, "cluster": {"collective_timeout_seconds": TIMEOUT}}


@pytest.mark.parametrize(("launcher", "ranks_per_host"), [("no_ssh", 2), ("pdsh", 1)])
def test_a_host_that_is_cut_off_ends_the_run(launcher: str, ranks_per_host: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, 2, ranks_per_host, **FOREVER)
    with Cluster(2) as cluster:
        first, *others = LAUNCHERS[launcher](cluster, tmp_path, ranks_per_host, str(PRETRAIN), "--config", str(config))
        first.wait_for("step 3/", 200)
        cluster.hosts[1].cut()
        outcome = first.wait(TIMEOUT + TO_SAY_SO)
        alone = [task.wait(TIMEOUT + TO_SAY_SO) for task in others]
    assert outcome.code > 0
    assert outcome.output.count("a collective failed at step ") == 1, outcome.output
    who = "rank 1 on host1 is gone" if ranks_per_host == 1 else "ranks 2-3 on host1 are gone"
    assert who in outcome.output, outcome.output
    assert "Traceback" not in outcome.output
    for there in alone:
        assert there.code > 0
        assert there.output.count("a collective failed at step ") == 1, there.output
        assert "rank 0's host does not answer at 10.77.0.1" in there.output


def test_a_host_that_dies_is_named(tmp_path: Path) -> None:
    train = {**FOREVER["train"], "batch_tokens": 3 * 32}
    config = write_config(tmp_path, 3, 1, **{**FOREVER, "train": train}, moe={"num_experts": 3})
    with Cluster(3) as cluster:
        first, last, _ = LAUNCHERS["torchrun"](cluster, tmp_path, 1, str(PRETRAIN), "--config", str(config))
        first.wait_for("step 3/", 200)
        cluster.hosts[2].kill()
        outcomes = [first.wait(TO_SAY_SO), last.wait(TO_SAY_SO)]
    assert all(outcome.code > 0 for outcome in outcomes)
    output = "".join(outcome.output for outcome in outcomes)
    assert output.count("a collective failed at step ") == 1, output
    assert "rank 2 on host2 is gone" in output


def test_a_link_that_heals_in_time_is_waited_for(tmp_path: Path) -> None:
    config = write_config(tmp_path, 2, 1, train={"steps": 40})
    with Cluster(2) as cluster:
        tasks = LAUNCHERS["no_ssh"](cluster, tmp_path, 1, str(PRETRAIN), "--config", str(config))
        tasks[0].wait_for("step 3/", 200)
        cluster.hosts[1].cut()
        time.sleep(5)
        cluster.hosts[1].heal()
        outcomes = [task.wait(120) for task in tasks]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    assert "step 40/40" in outcomes[0].output


@pytest.mark.parametrize(("host", "program"), [(0, "deepspeed"), (1, "deepspeed.launcher.launch")])
def test_a_launcher_that_is_killed_on_one_host_stops_all_with_a_checkpoint(
    host: int, program: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, 2, 1, **FOREVER)
    log = tmp_path / "runs" / "small" / "train.log"
    with Cluster(2) as cluster:
        (task,) = LAUNCHERS["pdsh"](cluster, tmp_path, 1, str(PRETRAIN), "--config", str(config))
        task.wait_for("step 3/", 200)
        # The oldest with such a command: deepspeed is older than what it has started.
        cluster.hosts[host].run(["sh", "-c", f"kill -KILL $(pgrep --oldest --full '[/ ]{program} ')"])
        says = f"host{host}: the launcher has gone ({program}, process "
        deadline = time.monotonic() + TO_SAY_SO
        while not (says in task.text() and "stopped after step " in log.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, task.text()
            time.sleep(0.1)
    (checkpoint,) = all_checkpoints(tmp_path / "runs" / "small" / "checkpoints")
    step = verify(checkpoint).facts.step
    assert f"stopped after step {step}; run the same command again" in log.read_text(encoding="utf-8")
