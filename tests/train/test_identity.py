"""A run is the same run from another working folder, through a link or in a moved project, and not with other files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsmoe.config import UserError, load_config
from dsmoe.config.dump import flatten
from dsmoe.config.schema import Config
from dsmoe.data import prepare
from dsmoe.interop.export_tokenizer import byte_tokenizer_json
from dsmoe.plan.plan import Plan
from dsmoe.train import run_folder as run_folders
from dsmoe.train.identity import RECORD, Contents, differences
from dsmoe.train.run_folder import check_run_folder, make_run_folder
from tests.train.test_run import pretrain, refused, write_config

OTHER = byte_tokenizer_json() + "\n"
"""Makes the same tokens, which is for nobody to know."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config whose tokenizer and corpus lie beside it; the working folder."""
    folder = tmp_path / "project"
    conf = folder / "conf"
    conf.mkdir(parents=True)
    (conf / "tok.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    (conf / "web.txt").write_text("A line of the corpus, and another.\n" * 300, encoding="utf-8")
    data = {"sources": ({"name": "web", "path": "web.txt"},), "cache_dir": "cache", "tokenizer": "tok.json"}
    write_config(conf, data=data, train={"steps": 2}, runs_dir="runs")
    monkeypatch.chdir(folder)
    return folder


def start(config: Config) -> None:
    """As a run does, as far as its first step, in a process of its own."""
    while run_folders._held:
        run_folders._held.popitem()[1].release()
    check_run_folder(Plan.from_config(config))
    make_run_folder(Plan.from_config(config), prepare(config))


def test_a_run_without_checkpoints_from_elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(load_config("conf/config.yaml"))
    start(load_config(project / "conf/config.yaml"))
    monkeypatch.chdir(project / "conf")
    made = ["runs_dir=../runs", "data.cache_dir=../cache"]
    start(load_config("config.yaml", made))
    (project.parent / "link").symlink_to(project)
    monkeypatch.chdir(project.parent)
    start(load_config("link/conf/config.yaml", ["runs_dir=link/runs", "data.cache_dir=link/cache"]))
    (project / "conf/tok.json").rename(project / "conf/renamed.json")
    project.rename(project.with_name("moved"))
    (project.parent / "link").unlink()
    monkeypatch.chdir("moved")
    start(load_config("conf/config.yaml", ["data.tokenizer=conf/renamed.json"]))
    start(load_config("conf/config.yaml", ["data.tokenizer=conf/renamed.json", "runs_dir=../moved/runs"]))


def test_a_run_without_checkpoints_of_other_contents(project: Path) -> None:
    start(load_config("conf/config.yaml"))
    tokenizer = project / "conf/tok.json"
    tokenizer.write_text(OTHER, encoding="utf-8")
    with pytest.raises(UserError, match=r"data.tokenizer is conf/tok.json \(sha256:.*there and conf/tok.json \(sha256"):
        check_run_folder(Plan.from_config(load_config("conf/config.yaml")))
    tokenizer.write_text(byte_tokenizer_json(), encoding="utf-8")
    (project / "same.txt").write_bytes((project / "conf/web.txt").read_bytes())
    (project / "other.txt").write_text("Another line of another corpus.\n" * 300, encoding="utf-8")
    start(load_config("conf/config.yaml", ["data.sources.0.path=same.txt"]))
    other = load_config("conf/config.yaml", ["data.sources.0.path=other.txt"])
    with pytest.raises(UserError, match=r"data.sources.0.path is same.txt there and other.txt here"):
        start(other)
    (project / "runs/small" / RECORD).write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.sources.0.path"):  # nothing says what was there
        check_run_folder(Plan.from_config(other))
    (project / "conf/web.txt").write_text("More of the corpus.\n" * 300, encoding="utf-8")
    start(load_config("conf/config.yaml", ["data.sources.0.path=same.txt"]))


def differing(path: Path, *overrides: str) -> list[str]:
    """The keys by which a config is another run than that of `conf/config.yaml`, of which nothing was recorded."""
    before = flatten(load_config("conf/config.yaml").model_dump(mode="json"))
    return [key for key, _, _ in differences(load_config(path, overrides), before, Contents(), has_checkpoints=False)]


def test_a_link_is_the_place_that_it_leads_to(project: Path) -> None:
    (project.parent / "link").symlink_to(project)
    linked = project.parent / "link/conf/config.yaml"
    assert load_config(linked).data.tokenizer == str(linked.with_name("tok.json"))
    assert differing(linked) == []


def test_another_tokenizer_where_nothing_was_recorded_is_another(project: Path) -> None:
    (project / "other.json").write_text(OTHER, encoding="utf-8")
    assert differing(project / "conf/config.yaml", "data.tokenizer=other.json") == ["data.tokenizer"]
    assert differing(project / "conf/config.yaml", "data.sources.0.path=other.json") == ["data.sources.0.path"]
    assert differing(project / "conf/config.yaml", "data.seed=7", "train.sequence_length=16") != []


def test_a_record_that_is_none_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", "{", "[" * 100_000, '{"tokenizer": 3}', '{"sources": {"a": 1}}', "\x00", '"x"'):
        (tmp_path / RECORD).write_text(text, encoding="utf-8")
        assert Contents.read(tmp_path) == Contents()
    shutil.rmtree(tmp_path / RECORD, ignore_errors=True)


def test_a_run_goes_on_from_elsewhere_and_not_with_another_tokenizer(project: Path) -> None:
    """Start beside the project's files, go on below them, through a link, and where the project has been moved to."""
    assert pretrain(project, "--config", "conf/config.yaml").code == 0
    made = ["runs_dir=../runs", "data.cache_dir=../cache"]
    below = pretrain(project / "conf", "--config", "config.yaml", *made, "train.steps=3")
    assert "continuing from" in below.out, below.err
    (project.parent / "link").symlink_to(project)
    linked = ["--config", "link/conf/config.yaml", "runs_dir=link/runs", "data.cache_dir=link/cache"]
    assert "continuing from" in pretrain(project.parent, *linked, "train.steps=4").out
    moved = project.rename(project.with_name("moved"))
    text = (moved / "conf/web.txt").read_bytes()
    (moved / "conf/web.txt").unlink()
    lost = pretrain(moved, "--config", "conf/config.yaml", "train.steps=5")
    assert "continuing from" in lost.out, lost.err
    was = "which was made of what was there, when that was {}/conf/web.txt"
    assert any(was.format(place) in lost.out for place in (project, project.parent / "link"))
    lost = pretrain(moved, "--config", "runs/small/config.yaml", "train.steps=5")  # which says where the text lay
    assert lost.code == 0, lost.err
    (moved / "conf/web.txt").write_bytes(text)
    onward = pretrain(moved, "--config", "conf/config.yaml", "train.steps=5")
    assert "and its tokens are taken from there" in onward.out, onward.err
    assert "continuing from" in onward.out
    # Another run goes on from this one, and is started again from another folder: with the same checkpoint, that is.
    second = ["name=second", "checkpoint.every=1"]
    first = pretrain(moved, "--config", "conf/config.yaml", *second, "checkpoint.resume=runs/small", "train.steps=7")
    assert first.code == 0, first.err
    path = "checkpoint.resume=../runs/small/checkpoints/step_00000005"
    again = pretrain(moved / "conf", "--config", "config.yaml", *second, *made, path, "train.steps=8")
    assert "step_00000007" in again.out, again.err

    (moved / "conf/tok.json").write_text(OTHER, encoding="utf-8")
    accept = ["data.changed_order=accept", "train.steps=6"]
    refused(pretrain(moved, "--config", "conf/config.yaml", *accept), "data.tokenizer is conf/tok.json (sha256:")
    (moved / "runs/small" / RECORD).unlink()  # its newest checkpoint says so as well
    refused(pretrain(moved, "--config", "conf/config.yaml", *accept), "data.tokenizer is conf/tok.json (sha256:")
    third = ["name=third", "checkpoint.resume=runs/small", *accept]
    refused(pretrain(moved, "--config", "conf/config.yaml", *third), "was made with another tokenizer")


SAME = {
    "model.num_kv_heads=4": "model.num_kv_heads=null",
    "model.head_dim=8": "model.head_dim=null",
    "optimizer.decay_steps=10": "optimizer.decay_steps=null",
}


@pytest.mark.parametrize("given", SAME)
def test_a_run_is_the_same_where_null_is_written_as_what_it_stands_for(given: str, project: Path) -> None:
    options = ["model.num_kv_heads=4", "optimizer.schedule=wsd", "train.steps=50"]
    start(load_config("conf/config.yaml", [*options, SAME[given]]))
    start(load_config("conf/config.yaml", [*options, given]))
    start(load_config("conf/config.yaml", [*options, SAME[given]]))
    key, _, value = given.partition("=")
    with pytest.raises(UserError, match=key):
        start(load_config("conf/config.yaml", [*options, f"{key}={int(value) // 2}"]))
