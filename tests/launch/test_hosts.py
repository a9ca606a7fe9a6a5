"""`dsmoe launch --hostfile`: what it writes, what DeepSpeed makes of it, and what it refuses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.config import dump_config, load_config
from dsmoe.launch import hosts
from dsmoe.launch.job import Job, Request, default_folder
from dsmoe.plan.plan import Plan

REPOSITORY = Path(__file__).parents[2]
MIXTRAL = "configs/mixtral_8x7b.yaml"
SOMEWHERE = "/shared/dsmoe/.venv"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "prefix", SOMEWHERE)


def job(*overrides: str, path: str = MIXTRAL) -> Job:
    config = load_config(path, overrides)
    return hosts.job(Request(Plan.from_config(config), path, overrides, default_folder(config)))


def slots_of(job: Job) -> list[str]:
    return [line for line in job.files["hostfile"].splitlines() if line[0] != "#"]


def test_the_committed_example_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """Remove the files, and write them again with the command that the hostfile names, after a change."""
    folder = REPOSITORY / "launch" / "hostfile"
    assert cli.main(["launch", MIXTRAL, "--hostfile", "--out", "launch/hostfile"]) == 0  # refuses other text
    assert capsys.readouterr().out.count("wrote launch/hostfile/") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["deepspeed_env", "hostfile"]
    (written,) = re.findall(r"# Written by `dsmoe (.*)`\.", (folder / "hostfile").read_text(encoding="utf-8"))
    assert shlex.split(written) == ["launch", MIXTRAL, "--hostfile", "--out", "launch/hostfile"]


def test_deepspeed_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parsers, and its own command for the hosts, run by a shell with another PATH."""
    from deepspeed.launcher import runner

    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "prefix", f"{tmp_path}/with space")
    written = job("cluster.hosts=gpu[01-08]", "cluster.device=cpu")
    paths = {path.name: path for path in written.write(tmp_path)}
    assert runner.fetch_hostfile(str(paths["hostfile"])) == {f"gpu0{number}": 8 for number in range(1, 9)}
    shell = "; ".join(f"export {line}" for line in exports(paths["deepspeed_env"])) + '; echo "$PATH $DS_ACCELERATOR"'
    command = ["/bin/sh", "-c", shell]
    seen = subprocess.run(
        command, env={"PATH": "/bin"}, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    assert seen == f"{tmp_path}/with space/bin:/bin cpu\n"


def exports(path: Path) -> list[str]:
    """The assignments of pdsh's command (deepspeed 0.19.8, launcher/runner.py:596)."""
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    class Exports(MultiNodeRunner):
        def __init__(self) -> None:
            self.exports: dict[str, str] = {}

        def backend_exists(self) -> bool:
            return True

        def get_cmd(self, environment: object, active_resources: object) -> list[str]:
            return [f"{key}={value}" for key, value in self.exports.items()]

    exports = Exports()
    for line in path.open(encoding="utf-8"):
        exports.add_export(*line.split("=", maxsplit=1))
    return exports.get_cmd(None, None)


def test_hosts_without_names_are_placeholders_and_said_to_be() -> None:
    written = job("cluster.hosts=null")
    assert slots_of(written) == [f"node{number:02d} slots=8" for number in range(1, 9)]
    assert "# THESE NAMES ARE PLACEHOLDERS" in written.files["hostfile"]
    assert "launch/mixtral_8x7b/hostfile are placeholders" in written.warning
    many = job(path="configs/trillion.yaml")
    assert slots_of(many)[::255] == ["node001 slots=8", "node256 slots=8"]


def test_paths_that_deepspeed_pastes_with_a_space_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "a folder"):
        (tmp_path / name).mkdir()
    config = str(REPOSITORY / MIXTRAL)
    names = ("cluster.hosts=n[1-8]",)
    for folder, python, found in [
        ("plain", "/opt/python", ""),
        ("plain", "/a folder/python", "a space is in the path of Python (/a folder/python), which"),
        ("a folder", "/opt/python", f"a space is in the path of this folder ({tmp_path}/a folder), which"),
        ("a folder", "/a b/python", f"of Python (/a b/python) and of this folder ({tmp_path}/a folder), which"),
    ]:
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(hosts.sys, "executable", python)
        monkeypatch.setattr("dsmoe.launch.job.__file__", "/opt/dsmoe/dsmoe/launch/job.py")
        several = hosts.job(Request(Plan.from_config(load_config(config, names)), config, names, "out"))
        assert found in several.warning
        assert bool(several.warning) == bool(found)
        alone = (*names, "cluster.nodes=1", "cluster.hosts=null")
        assert hosts.job(Request(Plan.from_config(load_config(config, alone)), config, alone, "out")).warning == ""
    monkeypatch.setattr("dsmoe.launch.job.__file__", "/opt/my dsmoe/dsmoe/launch/job.py")
    monkeypatch.setattr(hosts.sys, "executable", "/opt/python")
    monkeypatch.chdir(tmp_path / "plain")
    warning = hosts.job(Request(Plan.from_config(load_config(config, names)), config, names, "out")).warning
    assert "dsmoe's launch/pretrain.py (/opt/my dsmoe/launch/pretrain.py), which" in warning


def test_named_hosts_need_no_editing() -> None:
    written = job("cluster.hosts=n[1-4],m[1-4]", "cluster.devices_per_node=4")
    assert slots_of(written) == [f"{name} slots=4" for name in ("n1", "n2", "n3", "n4", "m1", "m2", "m3", "m4")]
    assert "PLACEHOLDERS" not in written.files["hostfile"]
    assert "placeholders" not in written.warning
    assert "--master_addr n1 --node_rank K" in written.files["hostfile"]


def test_one_node_needs_no_ssh_and_no_environment() -> None:
    written = job(path="configs/small_8gpu.yaml")
    assert set(written.files) == {"hostfile"}
    assert slots_of(written) == ["localhost slots=8"]
    assert "--no_ssh --master_addr localhost --node_rank 0 launch/pretrain.py" in written.command


def test_names_with_spaces_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(MIXTRAL)
    monkeypatch.chdir(tmp_path)  # where there is no launch/pretrain.py
    Path("my config.yaml").write_text(dump_config(config), encoding="utf-8")
    command = hosts.job(Request(Plan.from_config(config), "my config.yaml", ("name=x",), "a b")).command
    assert shlex.split(command) == [
        "DS_ENV_FILE=a b/deepspeed_env",
        *["deepspeed", "--hostfile", "a b/hostfile", str(REPOSITORY / "launch/pretrain.py")],
        *["--config", "my config.yaml", "name=x"],
    ]


def test_a_hostfile_that_is_there_is_used(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\n\n" + "".join(f"gpu{number} slots=8 # rack 1\n" for number in range(8)), encoding="utf-8")
    written = job(f"cluster.hostfile={path}")
    assert set(written.files) == {"deepspeed_env"}
    assert f"deepspeed --hostfile {path} launch/pretrain.py" in written.command
    assert "placeholders" not in written.warning


EIGHT = "".join(f"n{number} slots=8\n" for number in range(8))
WRONG = {
    "few hosts": (
        "cluster.hosts=n1,n2",
        "cluster.hosts names 2 hosts and cluster.nodes is 8; set cluster.nodes=2, or name 8",
    ),
    "a host twice": ("cluster.hosts=n[1-7],n3", "cluster.hosts names n3 more than once; every host is one node"),
    "no list": (
        "cluster.hosts=n[1-",
        "cluster.hosts: 'n[1-' is not a list of hosts; such lists are written n1,n2 or n[01-03,07],m2",
    ),
    "no file": ("cluster.hostfile=nope", "cluster.hostfile (nope) cannot be read: No such file or directory"),
    "a line of another kind": (EIGHT + "n9\n", '{file}:9: expected `HOST slots=DEVICES`, got "n9"'),
    "two hosts in what only looks like two lines": (
        "n1 slots=8\nn2 slots=8\nn3 slots=8\nn4 slots=8\u2028n5 slots=8\n",
        "cluster.hostfile ({file}) has 4 hosts and cluster.nodes is 8; set cluster.nodes=4, or have 8 lines in the "
        "file",
    ),
    "more devices than digits that Python reads": (
        f"n0 slots={'9' * 5000}\n",
        f'{{file}}:1: expected `HOST slots=DEVICES`, got "n0 slots={"9" * 47}...',
    ),
    "a device without an end": ("cluster.hostfile=/dev/zero", "cluster.hostfile (/dev/zero) is not a file"),
    "a folder": ("cluster.hostfile=/dev", "cluster.hostfile (/dev) is not a file"),
    "much too long": (
        "#" * (2**24 + 1),
        "cluster.hostfile ({file}) has more than 16,777,216 bytes: it is no hostfile",
    ),
    "a line twice": (EIGHT + "n0 slots=8\n", "{file}:9: n0 is named a second time; every host is one node"),
    "no line": (
        "# to be filled in\n\n",
        "cluster.hostfile ({file}) names no host; have 8 lines `HOST slots=8` in the file, or set "
        "cluster.hostfile=null",
    ),
    "far too many lines": (
        "".join(f"n{number} slots=8\n" for number in range(100_001)),
        "cluster.hostfile ({file}) has more than 100,000 hosts; is it the right file?",
    ),
    "few lines": (
        "n0 slots=8\n",
        "cluster.hostfile ({file}) has 1 host and cluster.nodes is 8; set cluster.nodes=1, or have 8 lines in the file",
    ),
    "several lines": (
        EIGHT + "n9\nn0 slots=8\nn1; slots=8\n",
        '{file}:9: expected `HOST slots=DEVICES`, got "n9"\n{file}:10: n0 is named a second time; every host is one '
        "node\n{file}:11: 'n1;' is not the name of a host: letters, digits and . : @ _ - make one",
    ),
    "few lines and other slots": (
        "n0 slots=4\n",
        "cluster.hostfile ({file}) has 1 host and cluster.nodes is 8; set cluster.nodes=1, or have 8 lines in the file"
        "\ncluster.hostfile ({file}): n0 slots=4, and cluster.devices_per_node is 8; every node has equally many: "
        "write slots=8, or set cluster.devices_per_node",
    ),
    "hosts twice, and few": (
        "cluster.hosts=n1,n2,n1",
        "cluster.hosts names n1 more than once; every host is one node\n"
        "cluster.hosts names 2 hosts and cluster.nodes is 8; set cluster.nodes=2, or name 8",
    ),
    "hosts that cannot have the batch": (
        "cluster.hosts=n[1-7]",
        "cluster.hosts names 7 hosts and cluster.nodes is 8; 7 nodes cannot train it as it is (train.batch_tokens "
        "(4194304) must be a multiple of data ranks * train.micro_batch_size * train.sequence_length (56 * 2 * 4096 = "
        "458752); nearest: 4128768 or 4587520), or name 8",
    ),
    "hosts that take another degree": (
        "cluster.hosts=n1 parallel.expert=8 cluster.nodes=8 cluster.devices_per_node=1",
        "cluster.hosts names 1 host and cluster.nodes is 8; set cluster.nodes=1 parallel.expert=1, or name 8",
    ),
    "other slots": (
        EIGHT.replace("n2 slots=8", "n2 slots=4"),
        "cluster.hostfile ({file}): n2 slots=4, and cluster.devices_per_node is 8; every node has equally many: write "
        "slots=8, or set cluster.devices_per_node",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_hosts_that_cannot_run_it_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, message = WRONG[case]
    file = tmp_path / "hosts"
    if not wrong.startswith("cluster."):
        file.write_text(wrong, encoding="utf-8")
        wrong = f"cluster.hostfile={file}"
    assert cli.main(["launch", MIXTRAL, *wrong.split(" "), "--hostfile", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message.format(file=file)}\n")
    assert not (tmp_path / "out").exists()
    if case != "no file":  # of which the check says where it was looked for
        assert cli.main(["config", "check", MIXTRAL, *wrong.split(" ")]) == 2
        err = capsys.readouterr().err
        assert all(line in err for line in message.format(file=file).splitlines())


def test_both_kinds_of_names_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", MIXTRAL, "cluster.hosts=n1", "cluster.hostfile=x", "--hostfile", "--dry-run"]) == 2
    assert "set one of them to null" in capsys.readouterr().err
