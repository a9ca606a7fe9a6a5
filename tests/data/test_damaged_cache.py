"""A damaged cache is refused with the name of its folder, wherever the damage is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Source
from dsmoe.data import PreparedSource, TrainLoader, cache, checksummed_files, prepare
from dsmoe.data.cache_meta import META, made_folders
from dsmoe.data.tokenizer import ByteTokenizer
from dsmoe.runtime.checksummed_json import json_with_checksum
from tests.data.conftest import MakeConfig
from tests.helpers import damage


@pytest.fixture(autouse=True)
def _made_up_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yield documents without files: 400 of about 200 KiB in all, and others for the source `b`."""

    def documents(source: Source, **folders: Path) -> Iterator[str]:
        return (f"{source.name} {n}: " + "some text " * (n % 97) for n in range(400))

    monkeypatch.setattr(cache, "documents", documents)


@pytest.fixture
def config(tmp_path: Path, make_config: MakeConfig) -> Config:
    for name in "ab":
        (tmp_path / name).touch()
    sources = [{"name": name, "path": str(tmp_path / name), "format": "jsonl"} for name in "ab"]
    return make_config(*sources, train={"sequence_length": 16, "batch_tokens": 16 * 64})


def exchange_with_another(path: Path, draw: random.Random) -> None:
    """Return a file to put in place: of the same name in the other source, or of another kind in the same folder."""
    (other_folder,) = [f for f in path.parent.parent.iterdir() if f != path.parent]
    others = [p for p in (*path.parent.iterdir(), other_folder / path.name) if p.read_bytes() != path.read_bytes()]
    path.write_bytes(draw.choice(sorted(others)).read_bytes())


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a `meta.json` and give it a valid checksum, as a deliberate edit would."""
    content = json.loads((path.parent / META).read_text(encoding="utf-8"))
    del content["sha256"]
    change(content)
    (path.parent / META).write_text(json_with_checksum(content), encoding="utf-8")


def lie(path: Path, draw: random.Random) -> None:
    """Put another value, or one of another type, into a `meta.json` with a valid checksum."""

    def change(content: dict[str, Any]) -> None:
        holder, key = content, draw.choice(["dtype", "max_token", "train", "validation", "recipe", "new"])
        while isinstance(holder.get(key), dict) and draw.random() < 0.9:
            holder, key = holder[key], draw.choice(sorted(holder[key]))
        wrong = [None, "x", "-1", -1, 0.5, [], {}, True, 10**30, "<f4", {"tokens": 1}]
        if key in ("bytes", "tokens", "documents", "max_token") and "token_file" not in holder:
            wrong += [holder[key] + 1] if key != "max_token" else [3, 257, 65535]
        value = draw.choice([w for w in wrong if w != holder.get(key)])
        if draw.random() < 0.2 and key in holder:
            del holder[key]
        else:
            holder[key] = value

    reseal(path, change)


def other_text(path: Path, draw: random.Random) -> None:
    """Return bytes that are no JSON, or JSON of another shape."""
    wrong = [b"\xff\xfe", b"[]", b"null", b"{", b"{}", b"[" * 100_000, b'{"a": 1e999}', b"12", b'"text"']
    (path.parent / META).write_bytes(draw.choice(wrong))


WAYS = [*damage.WAYS, exchange_with_another, *[lie] * 3, other_text]


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.fuzz)])
@pytest.mark.timeout(3600)
def test_every_damage_is_refused(count: int, config: Config, tmp_path: Path) -> None:
    """`prepare`, called as by a run, refuses seeded damage with one message that names the folder."""
    cache_dir, whole = Path(config.data.cache_dir), tmp_path / "whole"
    prepare(config)
    shutil.copytree(cache_dir, whole)

    def spoil(draw: random.Random) -> tuple[str, str]:
        shutil.rmtree(cache_dir)
        shutil.copytree(whole, cache_dir)
        folder = draw.choice(sorted(cache_dir.iterdir()))
        path, mutate = draw.choice(sorted(folder.iterdir())), draw.choice(WAYS)
        mutate(path, draw)
        return f"{mutate.__name__} {path.name}", str(folder)

    def is_clear(message: str) -> bool:
        return message.startswith("data.cache_dir: ") and len(message) < 600

    outcomes = damage.outcomes_of(count, spoil, lambda: prepare(config), UserError, is_clear)
    assert outcomes["accepted"] == outcomes["other"] == []
    assert len(outcomes["refused"]) == count


def rows(config: Config, sources: list[PreparedSource], step: int) -> list[list[int]]:
    return [row for batch in TrainLoader(sources, config, 0, 1).micro_batches(step) for row in batch.tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_damage_not_verified_at_the_start_is_found_on_reading(seed: int, config: Config) -> None:
    """Damage that is not verified at the start, as in a large cache, is found within an epoch."""
    sources = prepare(config)
    path, draw = sources[0].folder / "train.bin", random.Random(seed)
    for _ in range(3):
        damage.flip_a_bit(path, draw)
    found = prepare(config, check=0)
    with pytest.raises(checksummed_files.DamagedCacheError, match=f"{sources[0].folder} is damaged"):
        [rows(config, found, step) for step in range(200)]


def test_a_number_that_nothing_else_tells_is_sealed(config: Config) -> None:
    """The number of text bytes, from which bits per byte follow, is covered by the checksum."""
    (first, *_) = prepare(config)
    text = (first.folder / META).read_text(encoding="utf-8")
    number = f'"bytes": {first.validation_bytes}, "documents"'
    assert text.count(number) == 1
    (first.folder / META).write_text(text.replace(number, number.replace('": ', '": 1', 1)), encoding="utf-8")
    with pytest.raises(checksummed_files.DamagedCacheError, match=r"meta.json is not what was written"):
        prepare(config)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "train.documents"])
def test_other_tokens_with_checksums_of_their_own(name: str, config: Config) -> None:
    """A file restored from another folder together with its checksums is refused."""
    (first, *_) = prepare(config)
    data = (first.folder / name).read_bytes()
    checksummed_files.write_file(first.folder / name, data[16:] + data[:16])
    with pytest.raises(checksummed_files.DamagedCacheError, match=rf"{name}.sums is not what was written"):
        prepare(config)


def test_a_file_cut_off_while_it_is_read_is_an_error_and_no_signal(config: Config) -> None:
    sources = prepare(config)
    loader = TrainLoader(sources, config, 0, 1)
    list(loader.micro_batches(0))
    os.truncate(sources[0].folder / "train.bin", 10)
    with pytest.raises(checksummed_files.DamagedCacheError, match=r"train\.bin ends at byte 10, before its end"):
        list(loader.micro_batches(1))


def test_verified_files_are_not_read_again_until_they_change(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read_pieces: list[int] = []
    verify = cache.verify
    monkeypatch.setattr(cache, "verify", lambda pieces: (read_pieces.append(len(pieces)), verify(pieces)))
    sources = prepare(config)
    prepare(config)
    assert read_pieces[0] > 0 == read_pieces[1]
    status = os.stat(sources[1].folder / "train.bin")
    damage.flip_a_bit(sources[1].folder / "train.bin", random.Random(0))
    os.utime(sources[1].folder / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=f"{sources[1].folder} is damaged"):
        prepare(config)


def test_a_large_cache_is_sampled_at_a_start_and_read_whole_where_that_is_asked(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksummed_files, "SPAN", 4096)
    read_bytes: list[int] = []
    verify = cache.verify

    def counted(pieces: list) -> None:
        read_bytes.append(sum(end - begin for _, begin, end in pieces))
        verify(pieces)

    monkeypatch.setattr(cache, "verify", counted)
    whole = sum((source.train_tokens + source.validation_tokens) + 400 * 24 for source in prepare(config, check=None))
    monkeypatch.setattr(cache, "_VERIFIED", {})
    prepare(config, check=100_000)
    assert read_bytes[0] == whole
    assert 0.05 * whole < read_bytes[1] < 0.5 * whole
    prepare(config, check=100_000)
    prepare(config, check=None)
    assert read_bytes[2:] == [0, whole]


def test_a_token_beyond_the_vocabulary_is_found_before_training(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: ByteTokenizer, text: str) -> np.ndarray:
        return np.array([300, 1, 2], dtype=np.uint16)

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    with pytest.raises(UserError, match=r"data.tokenizer: it has made token 300 of .* ends at 256") as caught:
        prepare(config)
    assert "data.sources[a]" in str(caught.value)
    assert list(Path(config.data.cache_dir).iterdir()) == []


def test_the_first_token_beyond_the_vocabulary_is_refused(config: Config) -> None:
    """A cache with a valid checksum, as another tokenizer of the same digest would have made it."""
    (first, *_) = prepare(config)

    def change(largest: int) -> None:
        reseal(first.folder / "train.bin", lambda content: content.update(max_token=largest))

    change(ByteTokenizer.vocab_size - 1)
    prepare(config)
    change(ByteTokenizer.vocab_size)
    with pytest.raises(
        checksummed_files.DamagedCacheError, match=r"meta.json: tokens up to 257 as <u2, and the tokenizer has 257"
    ):
        prepare(config)


def test_a_cache_of_the_old_format_is_made_anew_and_said(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    old = Path(config.data.cache_dir) / "a-0123456789abcdef"
    old.mkdir(parents=True)
    (old / META).write_text(json.dumps({"dtype": "<u2", "recipe": {"format_version": 1}}), encoding="utf-8")
    with caplog.at_level("INFO"):
        source, _ = prepare(config)
    assert f"{old} is of format 1, without checksums and with another split: it is not used any more" in caplog.text
    assert source.folder != old
    assert old.exists()


@pytest.mark.timeout(60)
def test_a_pipe_called_as_the_description_of_a_cache_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "a-0123456789abcdef"
    folder.mkdir()
    os.mkfifo(folder / META)
    assert list(made_folders(tmp_path, "a")) == []
