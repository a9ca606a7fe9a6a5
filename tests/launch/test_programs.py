"""Printed commands run in the user's shell, whether it finds this environment's programs or not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.config import load_config
from dsmoe.launch.programs import activation, command_name
from dsmoe.plan.plan import Plan
from dsmoe.train.summary import summary

REPOSITORY = Path(__file__).parents[2]


def script(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `bin` of an environment in the working folder, whose programs the shell does not find by name."""
    folder = tmp_path / ".venv/bin"
    for name in ("dsmoe", "deepspeed", "tensorboard"):
        script(folder / name)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_program_is_typed_as_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_name("dsmoe") == ".venv/bin/dsmoe"
    assert command_name("nothing") == "nothing"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin:/bin")
    assert command_name("dsmoe") == "dsmoe"
    assert activation("dsmoe") is None
    other = script(environment.parents[1] / "other/dsmoe").parent
    monkeypatch.setenv("PATH", f"{other}:{environment}:/bin")
    assert command_name("dsmoe") == ".venv/bin/dsmoe"
    monkeypatch.chdir(environment)
    assert command_name("dsmoe") == "./dsmoe"
    monkeypatch.chdir("/usr")
    assert command_name("dsmoe") == f"{environment}/dsmoe"
    folder = script(environment.parents[1] / "a folder's/bin/dsmoe").parent
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert shlex.split(command_name("dsmoe")) == [f"{folder}/dsmoe"]


def test_what_makes_the_shell_find_them(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert activation("deepspeed") == "PATH=.venv/bin:$PATH"
    script(environment / "activate", f"PATH={environment}:$PATH")
    first = activation("deepspeed")
    assert first == ". .venv/bin/activate"
    for line in (first, "PATH=.venv/bin:$PATH"):
        subprocess.run(["sh", "-c", f"{line}\ncommand -v deepspeed"], check=True)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["dsmoe"])
    assert cli.main(["launch", "configs/tiny_cpu.yaml", "--hostfile", "--dry-run"]) == 0


def test_launch_says_it_before_the_command(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", str(REPOSITORY / "configs/tiny_cpu.yaml"), "--hostfile", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:-1] == [
        "this shell does not find deepspeed by its name; type first:",
        "PATH=.venv/bin:$PATH",
        "",
        "to start it, type in this folder:",
    ]


def test_the_commands_of_a_summary_are_words_of_a_shell(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = load_config(REPOSITORY / "configs/tiny_cpu.yaml")
    text = summary(Path("my runs/$x"), None, Plan.from_config(config))
    words = [shlex.split(line, comments=True) for line in text.splitlines()[1:]]
    assert words[0] == [".venv/bin/tensorboard", "--logdir", "my runs/$x/tensorboard"]
    assert words[1] == [".venv/bin/dsmoe", "config", "show", "my runs/$x/config.yaml"]
    assert words[2][:4] == ["DS_ACCELERATOR=cpu", ".venv/bin/deepspeed", "--num_gpus", "2"]
    assert "my runs/$x/config.yaml" in words[2]


def test_a_printed_command_runs_without_an_activated_environment(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    runs.mkdir()
    (runs / "config.yaml").write_bytes((REPOSITORY / "configs/tiny_cpu_dense.yaml").read_bytes())
    config = load_config(REPOSITORY / "configs/tiny_cpu_dense.yaml")
    before = os.environ["PATH"]
    os.environ["PATH"] = "/usr/bin:/bin"
    try:
        (line,) = [line for line in summary(runs, None, Plan.from_config(config)).splitlines() if "config show" in line]
    finally:
        os.environ["PATH"] = before
    (runs / "cluster").symlink_to(REPOSITORY / "configs/cluster")
    (runs / "tiny_cpu.yaml").symlink_to(REPOSITORY / "configs/tiny_cpu.yaml")
    shell = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, encoding="utf-8", env=shell, check=False)
    assert done.returncode == 0, done.stderr
    assert "name: " in done.stdout


def test_installing_without_triton_is_no_warning(tmp_path: Path) -> None:
    """The line of the Makefile that looks for it, in an environment without."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    script(venv / "bin/pip", f'echo "WARNING: $*" >&2; echo "$*" >> {tmp_path}/asked; test "$1" = install')
    command = ["make", "--dry-run", "--always-make", f"VENV={venv}", f"{venv}/.installed"]
    environment = {**os.environ, "MAKEFLAGS": ""}
    recipe = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8", env=environment, check=True
    ).stdout
    (line,) = [line for line in recipe.splitlines() if "triton==" in line]
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, encoding="utf-8", check=True)
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert [words.split()[:3] for words in asked] == [["install", "--quiet", "triton==3.6.0;"]]
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)  # that of the installation here
