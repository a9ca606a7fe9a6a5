"""The `dsmoe launch` command: dry runs, files that are there, and topologies that cannot be."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.launch.job import Job

REPOSITORY = Path(__file__).parents[2]
MIXTRAL = f"{REPOSITORY}/configs/mixtral_8x7b.yaml"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_writes_and_says_what_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", MIXTRAL, "--hostfile", "name=mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine: world size 64 (8 nodes x 8 devices)")
    assert lines[1:3] == ["wrote launch/mine/hostfile", "wrote launch/mine/deepspeed_env"]
    assert lines[-2] == "to start it, type in this folder:"
    assert lines[-1].startswith("DS_ENV_FILE=launch/mine/deepspeed_env deepspeed --hostfile launch/mine/hostfile ")
    program, *arguments = shlex.split(lines[-1])[-4:]
    assert program.endswith("launch/pretrain.py")
    assert arguments == ["--config", MIXTRAL, "name=mine"]
    assert files(tmp_path) == ["launch/mine/deepspeed_env", "launch/mine/hostfile"]


def test_a_dry_run_prints_the_same_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", MIXTRAL, "--hostfile", "--out", "there"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert files(tmp_path) == []
    assert cli.main(arguments) == 0
    for name in ("there/hostfile", "there/deepspeed_env"):
        assert f"\n==> {name}\n{Path(name).read_text(encoding='utf-8')}" in shown
    assert shown.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_an_edited_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", MIXTRAL, "--hostfile", "--out", "there"]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0  # the same text
    (tmp_path / "there/hostfile").write_text("gpu1 slots=8\n", encoding="utf-8")
    (tmp_path / "there/deepspeed_env").unlink()
    assert cli.main(arguments) == 2
    assert "error: there/hostfile: exists, with other text than would be written" in capsys.readouterr().err
    assert files(tmp_path / "there") == ["hostfile"]
    assert (tmp_path / "there/hostfile").read_text(encoding="utf-8") == "gpu1 slots=8\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.nodes=7", "parallel.expert=16", "moe.num_experts=16"], "nearest parallel.expert: "),
        (["train.batch_tokens=1000000"], "train.batch_tokens (1000000) must be a multiple of"),
        (["cluster.device=h100"], "cluster.device ('h100') is not a known device; did you mean"),
        (["cluster.hosts=a b"], "'a b' is not a list of hosts; such lists are written n1,n2 or n[01-03,07],m2"),
        (["--out", "taken"], "cannot write taken: File exists; name another folder: --out DIR"),
    ],
)
def test_what_cannot_run_is_refused_with_the_fix(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert cli.main(["launch", MIXTRAL, "--hostfile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert files(tmp_path) == ["taken"]


def test_a_file_that_is_no_text_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hostfile").write_bytes(b"\xff\xfe")
    assert cli.main(["launch", MIXTRAL, "--hostfile", "--out", "."]) == 2
    assert capsys.readouterr().err.startswith("error: hostfile: exists, with other text than would be written")


@pytest.mark.parametrize("arguments", [[], ["--hostfile", "--slurm"]])
def test_one_way_has_to_be_chosen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", MIXTRAL, *arguments])
    assert stop.value.code == 2


def test_scripts_are_executable_and_texts_are_not(tmp_path: Path) -> None:
    script, text = Job({"run.sh": "true\n", "notes": "\n"}, "true", executable=frozenset({"run.sh"})).write(tmp_path)
    assert (script.stat().st_mode & 0o777, text.stat().st_mode & 0o777) == (0o755, 0o644)
