"""`config check`, `prepare`, `plan`, `launch` and training agree about text, whether it is in place or lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe.cli import main
from dsmoe.config import ConfigError, load_config
from dsmoe.config.input_files import input_problems
from dsmoe.data import prepare
from dsmoe.data.check_sources import MOST_FILES, check_sources
from dsmoe.interop.export_tokenizer import byte_tokenizer_json
from tests.helpers.privileges import without_override
from tests.train.test_run import pretrain, refused, write_config

COMMANDS = (["config", "check"], ["prepare"], ["plan"], ["plan", "--json"], ["launch", "--docker", "--dry-run"])
READY = COMMANDS[:2]
"""Commands that check whether a run can start on this machine; the others plan for any machine."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run whose corpus, `text`, is in the cache."""
    (tmp_path / "text").mkdir()
    text = "A line of the corpus, and another.\n" * 300
    (tmp_path / "text/web.txt").write_text(text, encoding="utf-8")
    data = {"sources": ({"name": "web", "path": "text"},), "cache_dir": "cache"}
    write_config(tmp_path, data=data, train={"steps": 1}, runs_dir="runs")
    monkeypatch.chdir(tmp_path)
    prepare(load_config("config.yaml"))
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[tuple[int, str, str]]:
    """Return exit code, standard output and standard error of every command."""
    found = []
    for command in COMMANDS:
        code = main([*command, "config.yaml", *overrides])
        found.append((code, *capsys.readouterr()))
    return found


@pytest.mark.parametrize("lost", ["folder", "files"])
def test_the_cache_serves_without_the_text(
    lost: str, project: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(project / "text")
    if lost == "files":
        (project / "text").mkdir()
    (made,) = (project / "cache").glob("web-*")
    for command, (code, out, err) in zip(COMMANDS, say(capsys), strict=True):
        assert code == 0, (out, err)
        report = caplog.text if command == ["prepare"] else err  # `prepare` logs the note
        assert "data.sources[web].path: " in report
        assert f"its tokens are taken from {made}, which was made of what was there" in report
    json.loads(say(capsys)[3][1])
    outcome = pretrain(project, "--config", "config.yaml")
    assert outcome.code == 0, outcome.err
    assert f"its tokens are taken from {made}" in outcome.out


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a token": lambda folder: flip(folder / "train.bin"),
    "a held-out token": lambda folder: flip(folder / "validation.bin"),
    "a checksum": lambda folder: flip(folder / "train.bin.sums"),
    "a document": lambda folder: flip(folder / "train.documents"),
    "a file is cut": lambda folder: (folder / "train.bin").write_bytes(b""),
    "a file is missing": lambda folder: (folder / "train.documents").unlink(),
    "a number of its description": lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text(encoding="utf-8").replace('"documents": ', '"documents": 1'), encoding="utf-8"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_does_not_serve_without_the_text(
    damage: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice to delete a damaged cache would lose the only copy of lost text."""
    shutil.rmtree(project / "text")
    (made,) = (project / "cache").glob("web-*")
    DAMAGE[damage](made)
    for code, out, err in say(capsys):
        assert code == 2, (out, err)
        assert f"there is no file or folder {project}/text; and {made}, which was made of what was there, is" in err
        assert "put the text back" in err
        assert out == ""
    if damage == "a token":
        outcome = pretrain(project, "--config", "config.yaml")
        refused(outcome, "put the text back, and then delete that folder")


def test_without_text_and_cache(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run can be planned without text and tokenizer, but not started."""
    shutil.rmtree(project / "text")
    shutil.rmtree(project / "cache")
    for command, (code, out, err) in zip(COMMANDS, say(capsys), strict=True):
        assert code == (2 if command in READY else 0), (out, err)
        expected = {
            "prepare": f"there is no file or folder {project}/text",
            "config": "there is no file or folder text in",
        }
        assert expected.get(command[0], "there is no text at text; `dsmoe config check`, where the run is") in err


def test_config_check_finds_what_prepare_would(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of wrong text is reported by key and line, without torch; prepared text is not reported."""
    (project / "json").mkdir()
    (project / "json/a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    (project / "empty.txt").touch()
    (project / "latin.txt.gz").write_bytes(b"no gzip")
    wrong = {
        "json": "the folder .*json has no .txt file; set `format`, or give a glob",
        "json/a.jsonl": "would be read as plain text, field names included; set `format: jsonl`",
        "latin.txt.gz": "is cut off or damaged",
        "builtin:nothing": "unknown builtin builtin:nothing",
        "none.txt": "there is no file or folder none.txt in this folder, or beside the YAML file",
        "*.none": r"no file matches the glob \*.none in this folder, or beside the YAML file",
        "empty.txt": "has no text in it",
    }
    sources = [f"{{name: s{number}, path: '{path}'}}" for number, path in enumerate(wrong)]
    override = f"data.sources=[{{name: web, path: text}}, {', '.join(sources)}]"
    assert main(["config", "check", "config.yaml", override]) == 2
    report = capsys.readouterr().err
    for number, message in enumerate(wrong.values()):
        assert re.search(rf"data.sources.{number + 1}.\w+: .*{message}.* \(command line\)", report), (message, report)
    assert "data.sources.0" not in report
    assert main(["prepare", "config.yaml", override]) == 2
    command = f"assert main({['config', 'check', 'config.yaml']}) == 0"
    code = f"import sys; from dsmoe.cli import main; {command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("key", ["runs_dir", "data.cache_dir"])
@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_folder_that_cannot_be_made(key: str, place: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "file").touch()
    (project / "link").symlink_to("nowhere")
    assert main(["config", "check", "config.yaml", f"{key}={place}"]) == 2
    existing = "link" if place == "link" else "file"
    assert f"{key}: cannot use {project}/{place}: {project}/{existing} is no folder" in capsys.readouterr().err


TOKENIZERS: dict[str, Callable[[str], bytes]] = {
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "a number below 0": lambda text: text.replace('"!":33', '"!":-33').replace('"!": 33', '"!": -33').encode(),
    "a merge of no tokens": lambda text: re.sub(r'"merges": *\[', '"merges":[["q","zz"]', text).encode(),
    "another kind": lambda text: text.replace('"BPE"', '"other"').encode(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_is_read_as_prepare_reads_it(kind: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = byte_tokenizer_json()
    (project / "tok.json").write_bytes(TOKENIZERS[kind](text))
    assert (project / "tok.json").read_bytes() != text.encode()
    for command in READY:
        assert main([*command, "config.yaml", "data.tokenizer=tok.json"]) == 2
        assert "tok.json is not a JSON file of the `tokenizers` library" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_encode_the_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 1}, "unk_token": "[UNK]"}
    (project / "tok.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    assert main(["prepare", "config.yaml", "data.tokenizer=tok.json"]) == 2
    assert "tok.json cannot encode the text (WordLevel error: Missing [UNK] token" in capsys.readouterr().err


def test_a_token_number_that_no_vocabulary_reaches_is_the_tokenizers_mistake(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (2**31, 2**32 - 1):
        model = {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 1, "z": number}, "unk_token": "a"}
        (project / "tok.json").write_text(json.dumps({"model": model}), encoding="utf-8")
        assert main(["prepare", "config.yaml", "data.tokenizer=tok.json", "data.end_of_document=<eos>"]) == 2
        error = capsys.readouterr().err
        assert f"tok.json has a token of the number {number}, and a model has at most 2147483648 tokens" in error
        assert "set model.vocab_size" not in error


def test_of_a_large_folder_the_first_files_are_opened(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(MOST_FILES + 10):
        (project / f"text/{number:04d}.txt.gz").write_bytes(b"")
    assert main(["config", "check", "config.yaml"]) == 2
    assert f"{MOST_FILES - 5} more files cannot be read either" in capsys.readouterr().err


def closed(path: Path, mode: int, *overrides: str) -> list[str]:
    """Return the report of `config check` on a project where `path` has this mode; `prepare` is refused as well."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with without_override():
            assert main(["prepare", "config.yaml", *overrides]) == 2
            with pytest.raises(ConfigError) as refused:
                load_config("config.yaml", overrides, input_problems, lambda config: check_sources(config).problems)
    finally:
        path.chmod(before)
    return refused.value.problems


@pytest.mark.parametrize(
    ("place", "mode", "overrides", "message"),
    [
        ("tok.json", 0, ["data.tokenizer=tok.json"], "data.tokenizer: .*/tok.json cannot be read .Permission denied"),
        ("shut", 0, ["data.tokenizer=shut/tok.json"], "data.tokenizer: .*/shut/tok.json cannot be read .Permission"),
        ("cache", 0, [], "data.cache_dir: cannot use .*/cache: Permission denied .*/cache/web-"),
        ("cache", 0o555, ["data.seed=5"], "data.cache_dir: cannot use .*/cache: nothing may be written in it"),
        ("text", 0o444, ["data.sources=[{name: w, path: 'text/*.txt'}]"], "data.sources.0.path: .*Permission denied"),
        ("text", 0o000, ["data.sources=[{name: w, path: 'text/*'}]"], "data.sources.0.path: .*text.*Permission denied"),
    ],
)
def test_a_closed_path_is_reported_by_key_beside_other_problems(
    place: str, mode: int, overrides: list[str], message: str, project: Path
) -> None:
    (project / "shut").mkdir(exist_ok=True)
    for file in (project / "tok.json", project / "shut" / "tok.json"):
        file.write_text('{"model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}}', encoding="utf-8")
    problems = closed(project / place, mode, *overrides)
    assert re.search(rf"^{message}", problems[0]), problems
    problems = closed(project / place, mode, *overrides, "cluster.hostfile=nowhere")
    assert len(problems) == 2, problems


@pytest.mark.parametrize("run", ["", "/test"])
def test_runs_that_cannot_be_written(run: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = load_config("config.yaml").name
    folder = project / "there" / name if run else project / "there"
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    with without_override():
        assert main(["config", "check", "config.yaml", "runs_dir=there"]) == 2
    assert f"runs_dir: cannot use {folder}: nothing may be written in it" in capsys.readouterr().err
    folder.chmod(0o755)
    assert main(["config", "check", "config.yaml", "runs_dir=there"]) == 0


def test_a_whole_cache_need_not_be_written_to(project: Path) -> None:
    (project / "cache").chmod(0o555)
    with without_override():
        assert main(["config", "check", "config.yaml"]) == 0
    (project / "cache").chmod(0o755)


@pytest.mark.parametrize("key", ["cluster.hostfile", "checkpoint.resume", "checkpoint.weights_from"])
def test_files_in_a_closed_folder_are_not_reported_missing(
    key: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "shut").mkdir(0o000)
    with without_override():
        assert main(["config", "check", "config.yaml", f"{key}=shut/x"]) == 2
    (project / "shut").chmod(0o755)
    assert f"{key}: shut/x cannot be read: permission denied" in capsys.readouterr().err
