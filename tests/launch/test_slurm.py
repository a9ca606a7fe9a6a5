"""`dsmoe launch --slurm`: the scripts, for shellcheck and for an operator; tests/cluster/test_slurm.py runs them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.config import load_config
from dsmoe.launch import slurm
from dsmoe.launch.job import Request, default_folder

REPOSITORY = Path(__file__).parents[2]
MIXTRAL = "configs/mixtral_8x7b.yaml"
SCRIPTS = ["preflight.sbatch", "pretrain.sbatch"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def script(*overrides: str, name: str = "pretrain.sbatch") -> str:
    config = load_config(MIXTRAL, overrides)
    return slurm.job(Request(config, MIXTRAL, overrides, default_folder(config))).files[name]


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
        (written,) = re.findall(r"# Written by: dsmoe (.*)", (folder / name).read_text())
        assert shlex.split(written) == ["launch", MIXTRAL, "--slurm", "--out", "launch/slurm"]


@pytest.mark.parametrize("overrides", [[], ["cluster.device=cpu", "cluster.elastic=true", "runs_dir=/all my/runs"]])
def test_shellcheck_finds_nothing(overrides: list[str], tmp_path: Path) -> None:
    paths = slurm.job(Request(load_config(MIXTRAL, overrides), MIXTRAL, tuple(overrides), "somewhere")).write(tmp_path)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
