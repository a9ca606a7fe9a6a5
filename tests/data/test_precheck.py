"""`prepare` checks every source before it tokenises any, and reports all problems at once."""

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from dsmoe.cli import main
from dsmoe.config import dump_config
from dsmoe.config.errors import UserError
from dsmoe.data import corpora
from dsmoe.data.cache import prepare
from tests.data.conftest import MakeConfig


def corpus(path: Path, *texts: Any, field: str = "text") -> dict[str, Any]:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return {"name": path.stem, "path": str(path), "format": "jsonl"}


def test_all_problems_are_reported_before_anything_is_tokenised(make_config: MakeConfig, tmp_path: Path) -> None:
    good = corpus(tmp_path / "good.jsonl", *("some text " * 9 + str(number) for number in range(30)))
    named = corpus(tmp_path / "named.jsonl", "a", field="body")
    empty = corpus(tmp_path / "empty.jsonl", None)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:20])
    (tmp_path / "column.parquet").write_bytes(b"PAR1")
    config = make_config(
        good,
        {"name": "missing", "path": str(tmp_path / "missing.txt")},
        named,
        empty,
        {"name": "cut", "path": str(cut), "format": "jsonl"},
        {"name": "column", "path": str(tmp_path / "column.parquet"), "format": "parquet"},
        {"name": "nothing", "path": "builtin:nothing"},
        vocab_size=200,
    )
    with pytest.raises(UserError) as caught:
        prepare(config)
    messages = str(caught.value).split("\n")
    for message, expected in zip(
        messages,
        [
            "model.vocab_size (200) is smaller than the vocabulary of data.tokenizer bytes (257)",
            f"data.sources[missing].path: there is no file or folder {tmp_path}/missing.txt",
            f"data.sources[named].text_field: {tmp_path}/named.jsonl:1: no field 'text'; the fields are body",
            f"data.sources[empty].text_field: {tmp_path}/empty.jsonl:1: field 'text' is null",
            f"data.sources[cut].path: {cut} is cut off or damaged",
            f"data.sources[column].format: {tmp_path}/column.parquet is cut off or damaged, or is not a parquet file",
            "data.sources[nothing].path: unknown builtin",
        ],
        strict=True,
    ):
        assert message.startswith(expected)
    assert not (tmp_path / "cache").exists()


def test_the_command_ends_with_2_and_a_line_for_each_problem(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd\x04X")
    (tmp_path / "b.parquet").write_bytes(b"PAR1PAR1")
    config = make_config(
        {"name": "a", "path": str(tmp_path / "a.jsonl.zst"), "format": "jsonl"},
        {"name": "b", "path": str(tmp_path / "b.parquet"), "format": "parquet"},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert main(["prepare", str(tmp_path / "config.yaml"), "train.steps=1", "model.ffn_size=8"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: data.sources[a].path: {tmp_path}/a.jsonl.zst is cut off or damaged")
    assert second.startswith(f"data.sources[b].format: {tmp_path}/b.parquet is cut off or damaged")


def test_one_source_lists_a_few_files_and_counts_the_others(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(20):
        corpus(tmp_path / "in" / f"{number:02}.jsonl", "a", field="body")
    with pytest.raises(UserError) as caught:
        prepare(make_config({"name": "in", "path": str(tmp_path / "in"), "format": "jsonl"}))
    messages = str(caught.value).split("\n")
    assert [message.partition(": no field")[0][-8:] for message in messages[:5]] == [
        f"{n:02}.jsonl:1"[-8:] for n in range(5)
    ]
    assert messages[5:] == ["data.sources[in].path: 15 more files cannot be read either"]


def test_bad_records_that_are_skipped_are_no_problem(make_config: MakeConfig, tmp_path: Path) -> None:
    texts = [None, *("some text " * 9 + str(number) for number in range(30))]
    source = corpus(tmp_path / "a.jsonl", *texts)
    with pytest.raises(UserError, match="is null"):
        prepare(make_config(source))
    assert prepare(make_config({**source, "bad_records": "skip"}))[0].train_tokens > 0


def test_prepared_sources_are_not_opened_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(corpus(tmp_path / "a.jsonl", *("some text " * 9 + str(number) for number in range(30))))
    first = prepare(config)
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **keys: opened.append(path.name) or real(path, *args, **keys))
    assert prepare(config) == first
    assert "a.jsonl" not in opened


def test_a_hub_data_set_is_tried_before_the_work(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(name: str, **keys: Any) -> Any:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("no network"))
    monkeypatch.setattr(corpora, "documents", lambda *args: pytest.fail("tokenised"))
    good = corpus(tmp_path / "good.jsonl", "a", "b")
    with pytest.raises(UserError, match=r"^data.sources\[far\].hub: cannot open data set 'org/set'"):
        prepare(make_config(good, {"name": "far", "hub": "org/set"}))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("good-*"))


def test_a_hub_data_set_that_ends_in_an_error(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def rows() -> Any:
        yield {"text": "a"}
        yield {"text": "b"}
        raise EOFError("Compressed file ended")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **keys: rows())
    with pytest.raises(
        UserError, match=r"\[far\].hub: reading 'org/set' ended at row 2 \(EOFError: Compressed file ended\)"
    ):
        prepare(make_config({"name": "far", "hub": "org/set"}))
