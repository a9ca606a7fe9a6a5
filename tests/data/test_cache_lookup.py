"""Moved, copied or touched text is not tokenised again, and other text is never taken for it."""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe.cli import main
from dsmoe.config import load_config
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.data import cache, prepare
from dsmoe.data.cache_meta import META
from dsmoe.data.prepared_source import PreparedSource
from dsmoe.runtime.checksummed_json import json_with_checksum
from tests.data.conftest import MakeConfig
from tests.data.test_cache import decode, prepare_one, spec, write_corpus
from tests.train.test_run import write_config

TEXTS = [f"document number {n}" for n in range(60)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Write a corpus of two files, the second in a subfolder."""
    corpus = tmp_path / "project" / "corpora"
    (corpus / "more").mkdir(parents=True)
    write_corpus(corpus / "a.jsonl", TEXTS[:30])
    write_corpus(corpus / "more" / "b.jsonl", TEXTS[30:])
    return corpus.parent


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Fail when anything is tokenised, after `forbid`."""
    with monkeypatch.context() as patch:
        yield patch


def forbid(patch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **keys: object) -> None:
        raise AssertionError("tokenised again")

    patch.setattr(cache, "pack", fail)


def config_in(project: Path, make_config: MakeConfig, what: str = "corpora", **data: Any) -> Config:
    return make_config(spec(project / what), data={"cache_dir": str(project / "cache"), **data})


def same(first: PreparedSource, second: PreparedSource) -> bool:
    return (first.token_checksums, first.train_tokens) == (second.token_checksums, second.train_tokens)


@pytest.mark.parametrize("what", ["corpora", "corpora/a.jsonl", "corpora/*/*.jsonl", "corpora/**/*.jsonl"])
@pytest.mark.parametrize("change", ["moved", "copied", "touched"])
def test_the_same_text_elsewhere_is_not_tokenised_again(
    what: str,
    change: str,
    project: Path,
    make_config: MakeConfig,
    no_tokenizing: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = prepare_one(config_in(project, make_config, what))
    place = project.with_name("elsewhere")
    if change == "moved":
        project.rename(place)
    elif change == "copied":  # copied files have new times
        shutil.copytree(project, place, copy_function=shutil.copyfile)
    else:
        place = project
        for file in project.rglob("*.jsonl"):
            os.utime(file, ns=(1, 1))
    forbid(no_tokenizing)
    with caplog.at_level(logging.INFO):
        found = prepare_one(config_in(place, make_config, what))
    assert same(found, made)
    assert found.folder.parent == place / "cache"
    assert f"its text is that of {place}/cache/{made.folder.name}, and its tokens are taken from there" in caplog.text
    assert "preparing" not in caplog.text
    no_tokenizing.setattr(cache, "documents", cache.pack)  # recorded now, and found without reading the text
    assert prepare_one(config_in(place, make_config, what)) == found
    stored = [path.stat().st_ino for path in place.glob("cache/*/train.bin")]
    assert len(stored) == 2
    assert len(set(stored)) == 1  # hard links take no more room


def test_where_files_cannot_be_linked_they_are_copied(
    project: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare_one(config_in(project, make_config))

    def fail(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    moved = project.rename(project.with_name("elsewhere"))
    forbid(monkeypatch)
    found = prepare_one(config_in(moved, make_config))
    shutil.rmtree(moved / "cache" / made.folder.name)
    assert decode(found.train) + decode(found.validation)
    assert same(found, made)


def test_other_text_of_the_same_names_sizes_and_times_is_not_taken(
    project: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Archives, images and object stores give files the time 0; texts that differ in white space alone differ too."""
    corpora = {"first": TEXTS, "second": [text.upper() for text in TEXTS], "third": [f"{t[:-1]} " for t in TEXTS]}
    for name, texts in corpora.items():
        folder = project / name
        folder.mkdir()
        write_corpus(folder / "a.jsonl", texts)
        os.utime(folder / "a.jsonl", ns=(0, 0))
        with caplog.at_level(logging.INFO):
            found = prepare_one(config_in(project, make_config, name))
        assert sorted(decode(found.train) + decode(found.validation)) == sorted(texts)
    assert caplog.text.count("its text is to be tokenized") == 2


def run_mutations(project: Path, make_config: MakeConfig, rounds: int, seed: int) -> None:
    """Change the corpus at random, or not at all, and compare the tokens with those of an empty cache."""
    choose = random.Random(seed)
    place = project
    for number in range(rounds):
        files = sorted(place.rglob("*.jsonl"))
        file, other = choose.choice(files), choose.choice(files)
        kind = choose.choice(["move", "touch", "letter", "swap", "copy back", "space", "nothing"])
        times = file.stat().st_mtime_ns
        if kind == "move":
            place = place.rename(place.with_name(f"place{number}"))
        elif kind == "touch":
            os.utime(file, ns=(number, number))
        elif kind in ("letter", "space"):
            text = file.read_text(encoding="utf-8")
            begin = choose.choice([i for i in range(len(text)) if text.startswith("number", i)])
            letter = " " if kind == "space" else choose.choice("abc")
            file.write_text(text[: begin - 1] + letter + text[begin:], encoding="utf-8")
            if choose.random() < 0.5:
                place = place.rename(place.with_name(f"place{number}"))
                file = place / file.relative_to(files[0].parents[len(files[0].parts) - len(place.parts) - 1])
                os.utime(file, ns=(times, times))
        elif kind == "swap" and file != other:
            first, second = file.read_bytes(), other.read_bytes()
            file.write_bytes(second)
            other.write_bytes(first)
        elif kind == "copy back":
            write_corpus(place / "corpora/a.jsonl", TEXTS[:30])
        config = config_in(place, make_config)
        fresh = config_in(place, make_config, cache_dir=str(place.parent / f"fresh{number}"))
        found, wanted = prepare_one(config), prepare_one(fresh)
        assert found.token_checksums == wanted.token_checksums, (number, kind)
        assert np.array_equal(found.train, wanted.train)
        shutil.rmtree(place.parent / f"fresh{number}")


@pytest.mark.parametrize(
    ("caches", "seed"), [(1, 3), pytest.param(80, 4, marks=(pytest.mark.fuzz, pytest.mark.timeout(1800)))]
)
def test_whatever_happens_to_the_files_the_tokens_are_those_of_the_text(
    caches: int, seed: int, project: Path, make_config: MakeConfig
) -> None:
    for number in range(caches):
        copy = shutil.copytree(project, project.with_name(f"copy{number}") / "project")
        run_mutations(copy, make_config, 25, seed + number)
        shutil.rmtree(copy.parent)


def of_an_earlier_version(made: PreparedSource, source: Path, files: list[Path]) -> Path:
    """Turn a folder of the cache into one of an earlier version, which did not record the text."""
    content = json.loads((made.folder / META).read_bytes())
    del content["origin"], content["sha256"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([str(file), file.stat().st_size, file.stat().st_mtime_ns]).encode())
    keys = {"path": str(source), "num_files": len(files), "files": f"sha256:{digest.hexdigest()}"}
    content["recipe"]["source"].update(keys)
    fingerprint = hashlib.sha256(json.dumps(content["recipe"], sort_keys=True).encode()).hexdigest()[:16]
    (made.folder / META).write_text(json_with_checksum(content), encoding="utf-8")
    return made.folder.rename(made.folder.with_name(f"corpus-{fingerprint}"))


def test_a_cache_of_an_earlier_version_is_used_in_its_place_and_named_elsewhere(
    project: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = prepare_one(config_in(project, make_config))
    corpus = project / "corpora"
    old = of_an_earlier_version(made, corpus, [corpus / "a.jsonl", corpus / "more/b.jsonl"])
    with monkeypatch.context() as patch:
        forbid(patch)
        assert prepare_one(config_in(project, make_config)).folder == old
    moved = project.rename(project.with_name("elsewhere"))
    with caplog.at_level(logging.INFO):
        found = prepare_one(config_in(moved, make_config))
    assert found.folder.name != old.name
    assert same(found, made)
    assert f"{moved}/cache/{old.name} may be of the same text, and is not used: an earlier version" in caplog.text


def test_a_damaged_folder_of_the_same_text_is_not_taken(
    project: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    made = prepare_one(config_in(project, make_config))
    tokens = bytearray((made.folder / "train.bin").read_bytes())
    tokens[7] ^= 1
    (made.folder / "train.bin").write_bytes(tokens)
    moved = project.rename(project.with_name("elsewhere"))
    found = prepare_one(config_in(moved, make_config))
    assert sorted(decode(found.train) + decode(found.validation)) == sorted(TEXTS)
    assert f"{made.folder.name} is of the text of corpus, and is not used: data.cache_dir: " in caplog.text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokenise a project whose config and text are in a subfolder of the working directory."""
    conf = tmp_path / "project/conf"
    conf.mkdir(parents=True)
    (conf / "web.txt").write_text("A line of the corpus, and another.\n" * 300, encoding="utf-8")
    data = {"sources": ({"name": "web", "path": "web.txt"},), "cache_dir": "cache"}
    write_config(conf, data=data, train={"steps": 1}, runs_dir="runs")
    monkeypatch.chdir(conf.parent)
    prepare(load_config("conf/config.yaml"))
    return conf.parent


def test_lost_text_beside_a_config_elsewhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "conf/web.txt").unlink()
    for command in (["config", "check"], ["prepare"], ["plan"]):
        assert main([*command, "conf/config.yaml"]) == 0, capsys.readouterr().err
    assert (
        main(["config", "check", "conf/config.yaml", "data.sources.0.path=./web.txt"]) == 2
    )  # in the working directory, not beside the YAML file


def test_lost_text_of_a_project_that_was_moved(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "conf/web.txt").unlink()
    moved = run.rename(run.with_name("elsewhere"))
    monkeypatch.chdir(moved)
    (source,) = prepare(load_config("conf/config.yaml"))
    assert source.folder.parent == moved / "cache"
    assert f"which was made of what was there, when that was {run}/conf/web.txt" in caplog.text
    with pytest.raises(UserError, match=r"there is no file or folder .*/other.txt"):
        prepare(load_config("conf/config.yaml", ["data.sources.0.path=other.txt"]))


def test_why_the_cache_does_not_stand_for_lost_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "conf/web.txt").read_text(encoding="utf-8")
    (run / "conf/web.txt").unlink()
    (made,) = (run / "cache").glob("web-*")
    path = f"{run}/conf/web.txt"
    other = ["data.sources.0.path=mistyped.txt"]
    expected = {
        f"; the cache has {made}, made of {path}: if that is the text, give this source that path": other,
        f"; the cache has {made}, made with seed 0 (here 5): set that back, or the text is needed": ["data.seed=5"],
    }
    for message, overrides in expected.items():
        for command in (["config", "check"], ["prepare"]):
            assert main([*command, "conf/config.yaml", *overrides]) == 2
            assert message in capsys.readouterr().err
    assert main(["prepare", "conf/config.yaml", f"data.sources.0.path={path}"]) == 0
    (run / "conf/web.txt").write_text(text.upper(), encoding="utf-8")
    assert main(["prepare", "conf/config.yaml"]) == 0
    (run / "conf/web.txt").unlink()
    capsys.readouterr()
    assert main(["prepare", "conf/config.yaml"]) == 2
    assert "; the cache has several texts that were there: move away those that are not" in capsys.readouterr().err


def test_damaged_descriptions_are_passed_over(run: Path) -> None:
    (made,) = (run / "cache").glob("web-*")
    (run / "conf/web.txt").unlink()
    content = json.loads((made / META).read_bytes())
    values: list[Any] = [None, 3, [], {}, "x", [[]], {"path": []}]
    for number, (key, value) in enumerate((key, value) for key in (*content, "recipe.source") for value in values):
        bad = made.with_name(f"web-{number:016x}")
        bad.mkdir()
        changed = json.loads(json.dumps(content))
        (changed["recipe"] if "." in key else changed)[key.rpartition(".")[2]] = value
        (bad / META).write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(UserError, match="there is no file or folder"):
        prepare(load_config("conf/config.yaml", ["data.sources.0.path=other.txt"]))
    text = "A line of the corpus, and another.\n" * 300
    (run / "conf/again.txt").write_text(text, encoding="utf-8")
    (source,) = prepare(load_config("conf/config.yaml", ["data.sources.0.path=conf/again.txt"]))
    assert sum(map(len, (source.train, source.validation))) == len(text) + 2
