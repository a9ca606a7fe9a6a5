"""The job scripts on a real Slurm: however an attempt ends, the run ends with the losses of an undisturbed one.

One cluster for all tests. Two jobs that mostly wait have nodes of their own and go on beside the tests before theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe.config import load_config
from dsmoe.launch.job import Request
from dsmoe.launch.slurm import job as render
from dsmoe.plan.plan import Plan
from tests.helpers.emulated_hosts import Host
from tests.helpers.launching import REPOSITORY, losses, write_config
from tests.helpers.real_slurm import LOST_SECONDS, Slurm, SlurmJob, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
    pytest.mark.timeout(600),
]

STEPS = 100
LIMITED, FAILING, OTHERS = "--nodelist=host[1-2]", "--nodelist=host[3-4]", "--nodelist=host[5-6]"
TO_START = 120
"""Seconds until two ranks have begun, on a machine that has other things to do."""


def submit(slurm: Slurm, folder: Path, *options: str, **sections: object) -> SlurmJob:
    """Submit a run of two nodes with a rank each, as an operator does, in `folder`, by whose name it goes."""
    sections = {"name": folder.name, "train": {"steps": STEPS}, "checkpoint": {"every": 10}, **sections}
    config = write_config(folder, 2, 1, **sections)
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    render(Request(Plan.from_config(load_config(config)), config.name, (), "scripts")).write(folder / "scripts")
    return slurm.submit("scripts/pretrain.sbatch", folder, *options)


def losses_of(job: SlurmJob) -> list[float]:
    return losses(job.folder, job.folder.name)


def ranks_on(node: Host) -> list[str]:
    """The command lines of the ranks that run on a node, not those of Slurm's that started them."""
    lines = node.run(["ps", "-e", "-o", "args"]).output.splitlines()
    return [line for line in lines if "pretrain.py" in line and not line.startswith("srun")]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm(7) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def out_of_time(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmJob:
    """A job whose three minutes are not enough, its links being slow: it gets USR1 after 90 to 120 seconds.

    A step takes two seconds at this rate, on any machine.
    """
    for name in ("host1", "host2"):
        slurm.node(name).shape("1mbit")
    return submit(slurm, tmp_path_factory.mktemp("out_of_time"), "--time=3", "--signal=USR1@60", LIMITED)


@pytest.fixture(scope="module")
def diverging(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmJob:
    """A job that always fails at the same step."""
    return submit(slurm, tmp_path_factory.mktemp("diverging"), FAILING, optimizer={"lr": 1e30, "grad_clip": 1e30})


@pytest.fixture(scope="module")
def undisturbed(
    slurm: Slurm, out_of_time: SlurmJob, diverging: SlurmJob, tmp_path_factory: pytest.TempPathFactory
) -> SlurmJob:
    job = submit(slurm, tmp_path_factory.mktemp("undisturbed"), OTHERS)
    assert job.wait_for_end(2 * TO_START) == "COMPLETED", job.text()
    return job


def test_a_job_ends_with_its_ranks_exit_code(undisturbed: SlurmJob) -> None:
    facts = undisturbed.facts()
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "0")
    logs = undisturbed.folder / "runs" / undisturbed.folder.name / "logs"
    assert {path.name for path in logs.iterdir()} == {f"{undisturbed.number}-host{node}.log" for node in (5, 6)}
    assert f"0: step {STEPS}/{STEPS}" in (logs / f"{undisturbed.number}-host5.log").read_text(encoding="utf-8")
    assert len(losses_of(undisturbed)) == STEPS


def test_what_is_wrong_with_the_input_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--nodes=1", "--nodelist=host7")
    assert job.wait_for_end(TO_START) == "FAILED"
    assert (job.facts()["ExitCode"], job.restarts) == ("2:0", 0)
    assert "cluster.nodes x cluster.devices_per_node is 2 x 1 = 2 ranks" in job.text()
    assert "something has to be put right" in job.text()


def test_scontrol_requeue_and_preemption(slurm: Slurm, undisturbed: SlurmJob, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, OTHERS)
    job.wait_for("step 15/", TO_START)
    slurm.call("scontrol", "requeue", job.number)
    job.wait_for("continuing from", TO_START)
    assert job.text().count("SIGTERM: saving a checkpoint") >= 1
    job.wait_for("attempt 2 on host[5-6]", 5)
    urgent = ("--partition=urgent", "--exclusive", OTHERS, "--output=/dev/null", "--wrap=sleep 1")
    slurm.call("sbatch", *urgent)
    job.wait_for("queueing the job again", 60)
    assert "SIGUSR1: saving a checkpoint" in job.text()
    assert job.wait_for_end(2 * TO_START) == "COMPLETED", job.text()
    assert job.restarts == 2
    assert job.text().count("continuing from") == 2
    assert losses_of(job) == losses_of(undisturbed)


def test_a_cancelled_job_has_saved_and_is_left(slurm: Slurm, undisturbed: SlurmJob, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, OTHERS)
    job.wait_for("step 5/", TO_START)
    slurm.call("scancel", job.number)
    job.wait_for("exit code 75; Slurm ends this attempt", 30)
    assert (job.wait_for_end(30), job.restarts) == ("CANCELLED", 0)
    assert f"stopped after step {len(losses_of(job))}; run the same command" in job.text()


def test_a_node_that_is_cut_off(slurm: Slurm, undisturbed: SlurmJob, tmp_path: Path) -> None:
    cluster = {"collective_timeout_seconds": 20}
    job = submit(slurm, tmp_path, OTHERS.replace("nodelist", "exclude").replace("5-6", "1-4"), cluster=cluster)
    job.wait_for("step 25/", TO_START)
    first = slurm.node(job.facts()["BatchHost"])
    assert ranks_on(first)
    first.cut()
    job.wait_for("continuing from", 3 * LOST_SECONDS + TO_START)
    assert first.name not in job.facts()["NodeList"]
    first.heal()
    assert job.wait_for_end(2 * TO_START) == "COMPLETED", job.text()
    assert job.restarts == 1
    assert losses_of(job) == losses_of(undisturbed)
    assert not ranks_on(first), "the one that was cut off has ended by itself"


def test_a_job_that_gets_no_further_is_left(diverging: SlurmJob) -> None:
    assert diverging.wait_for_end(3 * TO_START) == "FAILED", diverging.text()
    assert (diverging.facts()["ExitCode"], diverging.restarts) == ("1:0", 2)
    assert "exit code 1: failure 1 of 3 (steps done: 1)" in diverging.text()
    assert "no attempt got further, so none is made again" in diverging.text()


def test_the_time_limit(slurm: Slurm, out_of_time: SlurmJob, undisturbed: SlurmJob) -> None:
    out_of_time.wait_for("exit code 75: the ranks were told to stop; queueing the job again", 3 * TO_START)
    for name in ("host1", "host2"):
        slurm.node(name).unshape()
    assert out_of_time.wait_for_end(2 * TO_START) == "COMPLETED", out_of_time.text()
    # One, unless the machine is so slow that there were more attempts before this test began.
    assert 1 <= out_of_time.restarts == out_of_time.text().count("told to stop; queueing the job again")
    assert "SIGUSR1: saving a checkpoint" in out_of_time.text()
    assert losses_of(out_of_time) == losses_of(undisturbed)


def test_the_script_for_64_gpus_asks_for_them(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(str(REPOSITORY / "launch/slurm/pretrain.sbatch"), tmp_path)
    facts = job.facts()
    assert (facts["JobState"], facts["NumNodes"], facts["NumTasks"]) == ("PENDING", "8-8", "64")
    assert (facts["TresPerNode"], facts["Requeue"], facts["TimeLimit"]) == ("gres:gpu:8", "1", "1-00:00:00")
    assert facts["MinMemoryNode"] == "0"
    slurm.call("scancel", job.number)
