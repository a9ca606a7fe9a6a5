import errno
import fcntl
import json
import logging
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource, cache, packing, prepare
from dsmoe.runtime import file_locks
from tests.data.conftest import MakeConfig
from tests.data.test_tokenizer import train_bpe

EOD = 256


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents of different length, some with characters of several bytes."""
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, [f"{n}: " + "wörd " * (n % 7 + 3) for n in range(40)])
    return path


def write_corpus(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read_corpus(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def spec(path: Path, **keys: object) -> dict:
    return {"name": "corpus", "path": str(path), "format": "jsonl", **keys}


def decode(tokens: np.ndarray) -> list[str]:
    """Return the documents of a byte-token file, each of which ends with the end-of-document token."""
    parts = np.split(tokens, np.flatnonzero(tokens == EOD) + 1)
    assert len(parts[-1]) == 0
    return [bytes(part[:-1].tolist()).decode("utf-8") for part in parts[:-1]]


def prepare_one(config: Config) -> PreparedSource:
    (source,) = prepare(config)
    return source


def folders(config: Config) -> list[str]:
    return sorted(os.listdir(config.data.cache_dir))


def test_round_trip_and_no_document_on_both_sides(corpus: Path, make_config: MakeConfig) -> None:
    texts = read_corpus(corpus)
    source = prepare_one(make_config(spec(corpus), data={"validation_fraction": 0.2}))
    train, validation = decode(source.train), decode(source.validation)
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # corpus order
    assert validation == [text for text in texts if text in set(validation)]
    assert not set(train) & set(validation)
    total = sum(len(text.encode()) for text in texts)
    longest = max(len(text.encode()) for text in texts)
    assert 0.2 * total <= source.validation_bytes < 0.2 * total + longest


def test_counts(corpus: Path, make_config: MakeConfig) -> None:
    source = prepare_one(make_config(spec(corpus, weight=3.0)))
    assert (source.name, source.weight, source.dtype) == ("corpus", 3.0, np.dtype("<u2"))
    assert len(source.train) == source.train_tokens
    assert len(source.validation) == source.validation_tokens
    assert source.train_bytes == sum(len(text.encode()) for text in decode(source.train))
    assert source.validation_bytes == sum(len(text.encode()) for text in decode(source.validation))
    assert source.validation_bytes_per_token == source.validation_bytes / source.validation_tokens
    meta = json.loads((source.folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["train"]["documents"] + meta["validation"]["documents"] == 40
    assert source.max_token == EOD
    with pytest.raises(ValueError, match="read-only"):
        source.train[0] = 1


@pytest.mark.parametrize("what", ["file", "folder", "glob", "dangling link"])
def test_the_text_need_not_stay_where_it_was(
    what: str, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "corpora"
    folder.mkdir()
    write_corpus(folder / "a.jsonl", [f"document number {n}" for n in range(100)])
    path = {"file": folder / "a.jsonl", "folder": folder, "glob": folder / "*.jsonl", "dangling link": tmp_path / "l"}
    (tmp_path / "l").symlink_to(folder / "a.jsonl")
    made = prepare_one(make_config(spec(path[what])))
    shutil.rmtree(folder)
    with caplog.at_level(logging.INFO):
        found = prepare_one(make_config(spec(path[what], weight=2.0)))
    assert (found.folder, found.token_checksums) == (made.folder, made.token_checksums)
    assert f"its tokens are taken from {made.folder}, which was made of what was there" in caplog.text
    for elsewhere in (tmp_path / "mistyped.jsonl", tmp_path / "corpora" / "mistyped" / "*.jsonl"):
        with pytest.raises(UserError, match=r"there is no file|no file matches"):
            prepare_one(make_config(spec(elsewhere)))
    for other in ({"seed": 5}, {"validation_fraction": 0.2}):  # another split needs the text
        with pytest.raises(UserError, match=r"there is no file|no file matches|leads nowhere"):
            prepare_one(make_config(spec(path[what]), data=other))


def test_of_one_text_whose_file_was_touched_either_folder_will_do(tmp_path: Path, make_config: MakeConfig) -> None:
    write_corpus(tmp_path / "a.jsonl", [f"document number {n}" for n in range(100)])
    made = []
    for moment in (1, 2):
        os.utime(tmp_path / "a.jsonl", (moment, moment))
        made.append(prepare_one(make_config(spec(tmp_path / "a.jsonl"))))
    assert made[0].folder != made[1].folder
    (tmp_path / "a.jsonl").unlink()
    assert prepare_one(make_config(spec(tmp_path / "a.jsonl"))).token_checksums == made[0].token_checksums


def test_a_path_is_one_however_it_is_written(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a.jsonl", [f"document number {n}" for n in range(100)])
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    folders = {prepare_one(make_config(spec(tmp_path / "a.jsonl"))).folder}
    monkeypatch.chdir(tmp_path)
    folders.add(prepare_one(make_config({**spec(tmp_path / "a.jsonl"), "path": "a.jsonl"})).folder)
    folders.add(prepare_one(make_config({**spec(tmp_path / "a.jsonl"), "path": "./a.jsonl"})).folder)
    assert len(folders) == 1


def test_of_two_texts_that_are_gone_neither_is_taken(tmp_path: Path, make_config: MakeConfig) -> None:
    for number in range(2):
        write_corpus(tmp_path / "a.jsonl", [f"document number {n + 1000 * number}" for n in range(100 + number)])
        prepare_one(make_config(spec(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="there is no file or folder"):
        prepare_one(make_config(spec(tmp_path / "a.jsonl")))


def test_equal_texts_stay_on_one_side(tmp_path: Path, make_config: MakeConfig) -> None:
    write_corpus(tmp_path / "a.jsonl", [f"document number {n % 10}" for n in range(100)])
    source = prepare_one(make_config(spec(tmp_path / "a.jsonl"), data={"validation_fraction": 0.15}))
    train, validation = decode(source.train), decode(source.validation)
    assert len(validation) == 20
    assert not set(train) & set(validation)


def test_a_single_document_is_cut(tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    text = "".join(f"line {n} ü\n" for n in range(500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with caplog.at_level(logging.INFO):
        source = prepare_one(make_config(spec(tmp_path / "a.txt", format="text")))
    (train,), (validation,) = decode(source.train), decode(source.validation)
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 * len(text.encode()) <= source.validation_bytes < 0.06 * len(text.encode())
    assert "corpus is a single document: its last 0.05 is held out" in caplog.text


def test_tokenizer_file_with_a_separator_of_another_name_and_uint32(
    tmp_path: Path, corpus: Path, make_config: MakeConfig
) -> None:
    from tokenizers import Tokenizer

    path = train_bpe(tmp_path / "tokenizer.json", "<|im_end|>")
    data = {"tokenizer": str(path), "end_of_document": "<|im_end|>"}
    source = prepare_one(make_config(spec(corpus), data=data, vocab_size=300))
    assert source.train.tolist().count(0) + source.validation.tolist().count(0) == len(read_corpus(corpus))
    decoded = Tokenizer.from_file(str(path)).decode(source.train.tolist())
    validation = Tokenizer.from_file(str(path)).decode(source.validation.tolist())
    assert len(decoded.encode()) == source.train_bytes
    assert sorted(decoded + validation) == sorted("".join(read_corpus(corpus)))

    large = json.loads(path.read_text(encoding="utf-8"))
    large["model"]["vocab"]["never"] = 70_000
    path.write_text(json.dumps(large), encoding="utf-8")
    wide = prepare_one(make_config(spec(corpus), data=data, vocab_size=70_001))
    assert wide.dtype == np.dtype("<u4")
    assert np.array_equal(wide.train, source.train)


def test_batches_and_copies_in_pieces_change_nothing(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_one(make_config(spec(corpus), data={"cache_dir": str(corpus.parent / "whole")}))
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(packing, "COPY_BYTES", 7)
    pieces = prepare_one(make_config(spec(corpus)))
    assert np.array_equal(whole.train, pieces.train)
    assert np.array_equal(whole.validation, pieces.validation)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the names of open files")
def test_everything_is_on_the_disk_before_it_has_its_name(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    folder = prepare_one(make_config(spec(corpus))).folder
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    assert sorted(before[:-1]) == sorted(os.listdir(folder))
    assert before[-1].endswith(".partial")
    assert after == [folder.parent.name]


def test_reuse_reads_no_text(corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(spec(corpus))
    first = prepare_one(config)

    def fail(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(cache, "documents", fail)
    assert prepare_one(config) == first
    reweighted = prepare_one(make_config(spec(corpus, weight=2.0), train={"sequence_length": 16}))
    assert (reweighted.folder, reweighted.weight) == (first.folder, 2.0)


def test_whatever_decides_the_content_makes_a_new_folder(corpus: Path, make_config: MakeConfig) -> None:
    made = [
        prepare_one(make_config(spec(corpus))),
        prepare_one(make_config(spec(corpus), data={"seed": 1})),
        prepare_one(make_config(spec(corpus), data={"validation_fraction": 0.1})),
        prepare_one(make_config(spec(corpus, name="other"))),
    ]
    write_corpus(corpus, [*read_corpus(corpus), "one more"])
    made.append(prepare_one(make_config(spec(corpus))))
    os.utime(corpus, ns=(0, 0))  # touched, with the same size
    made.append(prepare_one(make_config(spec(corpus))))
    assert len({source.folder for source in made}) == len(made)
    assert decode(made[0].validation) != decode(made[1].validation)
    assert "one more" in decode(made[4].train) + decode(made[4].validation)


@pytest.mark.parametrize("moment", ["pack", "copy_documents", "_publish"])
def test_a_failure_in_the_middle_leaves_nothing(
    moment: str, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(spec(corpus))

    def fail(*args: object, **keys: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(cache, moment, fail)
        with pytest.raises(OSError, match="disk full"):
            prepare(config)
    assert folders(config) == []
    assert len(decode(prepare_one(config).train)) > 30


def test_a_killed_run_does_no_harm(corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(spec(corpus))
    monkeypatch.setattr(cache, "_publish", lambda *args: os._exit(9))
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [re.sub("[0-9a-f]{16,}", "HEX", name) for name in folders(config)] == [
        ".corpus-HEX.HEX.lock",
        ".corpus-HEX.HEX.partial",
    ]
    monkeypatch.undo()
    source = prepare_one(config)
    assert len(decode(source.train)) > 30
    assert folders(config) == [source.folder.name]


def test_only_folders_of_dead_processes_are_removed(corpus: Path, make_config: MakeConfig) -> None:
    """Folders of this source are removed if their lock is free; if made on another machine, only after a day."""
    config = make_config(spec(corpus))
    cache_dir = Path(config.data.cache_dir)
    cache_dir.mkdir()

    def leave(number: int, source: str = "corpus", host: str = file_locks.machine(), age: float = 0) -> list[str]:
        partial = cache_dir / f".{source}-{16 * '0'}.{number:032x}.partial"
        partial.mkdir()
        (partial / "tokens.bin").write_bytes(b"")
        partial.with_suffix(".lock").write_text(host, encoding="utf-8")
        for path in (partial / "tokens.bin", partial):
            os.utime(path, (time.time() - age,) * 2)
        return [partial.with_suffix(".lock").name, partial.name]

    leave(1)
    leave(2, host="elsewhere", age=100_000)
    alive = leave(3)
    kept = [*alive, *leave(4, host="elsewhere", age=80_000), *leave(5, source="corpus-2")]
    for age, of_earlier_version in ((100_000, "old"), (80_000, "young")):
        path = cache_dir / f".corpus-{16 * '0'}.{of_earlier_version}.77.{32 * '0'}.partial"
        path.mkdir()
        os.utime(path, (time.time() - age,) * 2)
    held = file_locks.take(cache_dir / alive[0])
    source = prepare_one(config)
    held.release()
    assert folders(config) == sorted([*kept, path.name, source.folder.name])


def test_a_live_process_of_the_same_host_and_number_keeps_its_folder(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers may have the same host name, and processes that the other does not see."""
    config = make_config(spec(corpus))
    context = multiprocessing.get_context("fork")
    building, go_on = context.Event(), context.Event()
    publish = cache._publish

    def publish_later(partial: Path, folder: Path) -> None:
        building.set()
        assert go_on.wait(timeout=60)
        publish(partial, folder)

    def elsewhere() -> None:
        monkeypatch.setattr(cache, "_publish", publish_later)
        prepare(config)

    process = context.Process(target=elsewhere)
    process.start()
    assert building.wait(timeout=60)
    monkeypatch.setattr(os, "kill", None)  # as in a container, where the process number says nothing
    prepare(make_config(spec(corpus), data={"seed": 1}))
    assert sum(name.endswith(".partial") for name in folders(config)) == 1
    go_on.set()
    process.join()
    assert process.exitcode == 0
    assert [name for name in folders(config) if name.startswith(".")] == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_preparing_works_and_a_warning_is_logged(
    number: int,
    corpus: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    config = make_config(spec(corpus))
    monkeypatch.setattr(fcntl, "flock", fail)
    left = Path(config.data.cache_dir) / f".corpus-{16 * '0'}.{32 * '0'}.partial"
    left.mkdir(parents=True)
    source = prepare_one(config)
    assert len(decode(source.train)) > 30
    assert folders(config) == [left.name, source.folder.name]
    assert "without locks (flock): what a killed process leaves there, .*.partial, is not removed" in caplog.text


@pytest.mark.parametrize("below", ["file", "file/cache", "file/cache/dsmoe"])
def test_a_cache_dir_that_cannot_be_is_named(below: str, corpus: Path, make_config: MakeConfig) -> None:
    file = corpus.parent / "file"
    file.touch()
    cache_dir = corpus.parent / below
    with pytest.raises(UserError) as caught:
        prepare(make_config(spec(corpus), data={"cache_dir": str(cache_dir)}))
    assert re.fullmatch(
        rf"data.cache_dir: cannot use {cache_dir}: Not a directory \({file}.*\); give data.cache_dir a folder that can "
        "be read and written, and has room",
        str(caught.value),
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("moment", ["pack", "copy_documents", "_publish"])
def test_a_full_disk_is_named(
    moment: str, number: int, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(spec(corpus))

    def fail(*args: object, **keys: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, moment, fail)
    reason = os.strerror(number)
    with pytest.raises(UserError, match=rf"^data.cache_dir: cannot use {config.data.cache_dir}: {reason}; give"):
        prepare(config)
    assert folders(config) == []


def test_a_folder_of_another_user_is_not_damaged(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(spec(corpus))
    folder = prepare_one(config).folder

    def fail(path: Path, **keys: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(UserError, match=rf"cannot use .*: Permission denied \({folder}/meta.json\)"):
        prepare(config)


def test_an_unreadable_corpus_is_not_blamed_on_the_cache(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **keys: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(corpus))

    monkeypatch.setattr(cache, "documents", fail)
    with pytest.raises(PermissionError):
        prepare(make_config(spec(corpus)))


def test_a_tokenizer_without_end_of_document_is_refused_before_anything_is_read(
    tmp_path: Path, corpus: Path, make_config: MakeConfig
) -> None:
    path = train_bpe(tmp_path / "tokenizer.json", "<|im_end|>")
    config = make_config(spec(corpus), data={"tokenizer": str(path)}, vocab_size=300)
    with pytest.raises(UserError) as error:
        prepare(config)
    assert "none of the usual end-of-document tokens (<|endoftext|>, </s>, <|end_of_text|>, <eos>)" in str(error.value)
    assert str(error.value).endswith("for example of its special tokens: <|im_end|>")
    assert not Path(config.data.cache_dir).exists() or not list(Path(config.data.cache_dir).iterdir())


def test_racing_processes_share_one_folder(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(spec(corpus))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    publish = cache._publish

    def publish_together(partial: Path, folder: Path) -> None:
        barrier.wait(timeout=60)  # all processes have written their folder before one renames it
        publish(partial, folder)

    monkeypatch.setattr(cache, "_publish", publish_together)
    processes = [context.Process(target=prepare, args=(config,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    source = prepare_one(config)
    assert folders(config) == [source.folder.name]
    assert len(decode(source.train)) > 30


@pytest.mark.parametrize("damage", ["train.bin", "meta.json", "remove"])
def test_a_damaged_folder_is_named(damage: str, corpus: Path, make_config: MakeConfig) -> None:
    config = make_config(spec(corpus))
    source = prepare_one(config)
    if damage == "remove":
        (source.folder / "validation.bin").unlink()
    else:
        (source.folder / damage).write_bytes(b"{")
    with pytest.raises(UserError, match=rf"data.cache_dir: {source.folder} is damaged .*; delete that folder"):
        prepare(config)


def test_parts_shorter_than_a_sequence_are_all_reported(tmp_path: Path, make_config: MakeConfig) -> None:
    write_corpus(tmp_path / "a.jsonl", ["short", "shorter"])
    config = make_config(spec(tmp_path / "a.jsonl"), train={"sequence_length": 16})
    with pytest.raises(UserError) as caught:
        prepare(config)
    training, validation = str(caught.value).splitlines()
    assert re.match(
        r"data.sources\[corpus\]: the training part has [68] tokens, but train.sequence_length \(16\) \+ 1 = 17 are "
        r"needed; give it more text, or lower train.sequence_length",
        training,
    )
    assert re.match(r"data.sources\[corpus\]: the validation part has [68] tokens, .*validation_fraction", validation)


def test_copies_of_one_text_cannot_be_split(tmp_path: Path, make_config: MakeConfig) -> None:
    write_corpus(tmp_path / "a.jsonl", ["the same text"] * 10)
    with pytest.raises(UserError, match=r"the validation part has 0 tokens, .*more than one distinct document"):
        prepare(make_config(spec(tmp_path / "a.jsonl")))


def test_progress_is_logged(
    corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        source = prepare_one(make_config(spec(corpus)))
    tokens = source.train_tokens + source.validation_tokens
    assert re.search(rf"corpus: 40 documents, {tokens:,} tokens so far, [0-9.]+ MB/s", caplog.text)
    assert f"train {source.train_tokens:,} tokens of" in caplog.text
