"""`dsmoe launch --slurm`: the scripts, for shellcheck and for an operator; tests/cluster/test_slurm.py runs them."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.config import UserError, load_config
from dsmoe.launch import slurm
from dsmoe.launch.job import Request, default_folder
from dsmoe.plan.plan import Plan
from dsmoe.train.run_folder import LOCK, TOKEN

REPOSITORY = Path(__file__).parents[2]
MIXTRAL = "configs/mixtral_8x7b.yaml"
SCRIPTS = ["preflight.sbatch", "pretrain.sbatch"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def script(*overrides: str, name: str = "pretrain.sbatch") -> str:
    config = load_config(MIXTRAL, overrides)
    return slurm.job(Request(Plan.from_config(config), MIXTRAL, overrides, default_folder(config))).files[name]


def options(text: str) -> dict[str, str]:
    """The options that Slurm reads, without the comments after them."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.MULTILINE)
    assert len(dict(found)) == len(found) == text.count("\n#SBATCH ")
    return dict(found)


def test_the_committed_examples_are_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """Remove the files, and write them again with the command that they name, after a change."""
    folder = REPOSITORY / "launch" / "slurm"
    assert cli.main(["launch", MIXTRAL, "--slurm", "--out", "launch/slurm"]) == 0  # refuses other text
    assert capsys.readouterr().out.endswith("type in this folder:\nsbatch launch/slurm/pretrain.sbatch\n")
    assert sorted(path.name for path in folder.iterdir()) == SCRIPTS
    for name in SCRIPTS:
        (written,) = re.findall(r"# Written by: dsmoe (.*)", (folder / name).read_text(encoding="utf-8"))
        assert shlex.split(written) == ["launch", MIXTRAL, "--slurm", "--out", "launch/slurm"]


@pytest.mark.parametrize("overrides", [[], ["cluster.device=cpu", "cluster.elastic=true", "runs_dir=/all my/runs"]])
def test_shellcheck_finds_nothing(overrides: list[str], tmp_path: Path) -> None:
    request = Request(Plan.from_config(load_config(MIXTRAL, overrides)), MIXTRAL, tuple(overrides), "somewhere")
    paths = slurm.job(request).write(tmp_path)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *paths], capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


FAKES = {
    "srun": '[[ $* == *pretrain.py* ]] && eval "$SRUN" || eval "$LOOK"',
    "squeue": 'eval "$SQUEUE"',
    "scontrol": 'echo "scontrol $*"',
    "sleep": "true",
}
"""What these commands do instead; the test says it in the environment."""


@dataclass
class Cluster:
    """A folder in which a job script is run by bash, without Slurm."""

    folder: Path

    def run(self, srun: str, squeue: str = "echo RUNNING", look: str = "true") -> tuple[int, str]:
        """Exit code and output of pretrain.sbatch, where `look` is how each node sees the run folder."""
        environment = {**os.environ, "PATH": f"{self.folder}/fakes:{os.environ['PATH']}"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
        environment |= {"SRUN": srun, "SQUEUE": squeue, "LOOK": look}
        environment["PYTHONPATH"] = str(REPOSITORY)
        command = ["bash", str(self.folder / "scripts" / "pretrain.sbatch")]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    path = tmp_path / "config.yaml"
    path.write_text(f"include: {REPOSITORY}/configs/tiny_cpu.yaml\nname: mine\n", encoding="utf-8")
    slurm.job(Request(Plan.from_config(load_config(path)), "config.yaml", (), "scripts")).write(tmp_path / "scripts")
    (tmp_path / "fakes").mkdir()
    for name, action in FAKES.items():
        (tmp_path / "fakes" / name).write_text(f"#!/bin/bash\n{action}\n", encoding="utf-8")
        (tmp_path / "fakes" / name).chmod(0o755)
    return Cluster(tmp_path)


BEGUN = f"touch runs/mine/{TOKEN}"
REQUEUED = "scontrol requeue 7\n"


@pytest.mark.parametrize(
    ("code", "says", "again"),
    [
        (0, "done", False),
        (2, "something has to be put right first", False),
        (75, "the ranks were told to stop; queueing the job again", True),
        (1, "failure 1 of 3 (steps done: 0); queueing the job again", True),
    ],
)
def test_the_ranks_exit_code_is_the_jobs(code: int, says: str, again: bool, cluster: Cluster) -> None:
    ended, said = cluster.run(f"{BEGUN}; exit {code}")
    assert (ended, REQUEUED in said) == (code, again)
    assert says in said


def test_a_step_that_started_no_rank_is_not_a_run_that_is_done(cluster: Cluster) -> None:
    cluster.run(f"{BEGUN}; exit 75")
    for again in (True, True, False):
        code, said = cluster.run("exit 0")
        assert (code, REQUEUED in said) == (1, again)
        assert "no rank has begun" in said


def test_a_rank_has_begun_by_the_file_that_every_start_writes(cluster: Cluster) -> None:
    """`environment.json` is a report: a run goes on, and ends well, where it cannot be written."""
    assert f"! $run/{TOKEN} -nt $run/{LOCK} " in script()
    code, said = cluster.run(
        "mkdir runs/mine/environment.json; touch -d '1 day ago' runs/mine/environment.json; " + BEGUN
    )
    assert (code, "no rank has begun" in said) == (0, False)


@pytest.mark.parametrize("squeue", ["exit 1", "true"])
def test_a_controller_that_does_not_answer_is_asked_for_another_attempt(squeue: str, cluster: Cluster) -> None:
    code, said = cluster.run(f"{BEGUN}; exit 75", squeue)
    assert (code, REQUEUED in said) == (75, True)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_what_slurm_ends_is_left_to_it(state: str, cluster: Cluster) -> None:
    code, said = cluster.run(f"{BEGUN}; exit 75", f"echo {state}")
    assert (code, REQUEUED in said) == (75, False)
    assert f"Slurm ends this attempt ({state})" in said


def test_a_run_folder_that_cannot_be_is_wrong_input(cluster: Cluster) -> None:
    (cluster.folder / "runs").write_text("", encoding="utf-8")
    code, said = cluster.run("echo started")
    assert (code, "cannot write in runs/mine" in said, "started" in said) == (2, True, False)


def test_a_node_that_does_not_see_the_run_folder_is_wrong_input(cluster: Cluster) -> None:
    code, said = cluster.run("echo started", look="echo n2: cannot write; exit 1")
    assert (code, "n2: cannot write" in said, "started" in said) == (2, True, False)
    assert "not every node can write in runs/mine" in said


def test_another_folder_is_wrong_input_and_nothing_is_left_there(cluster: Cluster) -> None:
    (cluster.folder / "config.yaml").unlink()
    code, said = cluster.run("echo started")
    assert (code, "there is no config.yaml here" in said, "started" in said) == (2, True, False)
    assert not (cluster.folder / "runs").exists()


def test_an_attempt_waits_for_who_still_trains(cluster: Cluster) -> None:
    (cluster.folder / "runs" / "mine").mkdir(parents=True)
    with (cluster.folder / "runs" / "mine" / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor() as threads:
            job = threads.submit(cluster.run, f"{BEGUN}; echo started")
            time.sleep(1)
            assert not job.done()
            lock.close()
            code, said = job.result(60)
    assert (code, "waiting for a process that still trains in runs/mine" in said, "started" in said) == (0, True, True)


def test_hosts_that_the_config_names_are_asked_for() -> None:
    assert options(script("cluster.hosts=gpu[1-8]"))["nodelist"] == "gpu[1-8]"
    with pytest.raises(UserError, match=r"names 7 hosts and cluster\.nodes is 8"):
        script("cluster.hosts=gpu[1-7]")


def test_another_folders_scripts_name_the_program_by_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(MIXTRAL)
    monkeypatch.chdir(tmp_path)
    files = slurm.job(Request(Plan.from_config(config), "/c.yaml", (), "scripts")).files
    for name in ("pretrain", "preflight"):
        program = shlex.quote(f"{REPOSITORY}/launch/{name}.py")
        assert f"python {program} --config /c.yaml" in files[f"{name}.sbatch"]


def test_sizes_are_the_configs() -> None:
    asked = options(script("cluster.nodes=4", "name=half"))
    assert (asked["job-name"], asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == (
        "half",
        "4",
        "8",
        "8",
    )
    assert "gpus-per-node" not in options(script("cluster.device=cpu"))
    assert "NCCL" not in script("cluster.device=cpu")
    assert "another number will do" not in script()
    assert "another number will do" in script("cluster.elastic=true")


def test_ranks_get_what_was_typed() -> None:
    typed = ("runs_dir=/all my/runs", "train.seed=3")
    arguments = f"--config {MIXTRAL} 'runs_dir=/all my/runs' train.seed=3"
    assert f"python launch/pretrain.py {arguments} &\n" in script(*typed)
    assert "\nrun='/all my/runs/mixtral_8x7b'\n" in script(*typed)
    assert script(*typed, name="preflight.sbatch").endswith(f"python launch/preflight.py {arguments}\n")


def test_lines_fit_a_screen() -> None:
    assert not [line for name in SCRIPTS for line in script(name=name).splitlines() if len(line) > 120]
