"""Text that one source holds out is never trained on through another."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Source
from dsmoe.data import PreparedSource, TrainLoader, bigram_nats, cache, held_out_overlap, prepare
from dsmoe.data.checksummed_files import write_file
from tests.data.conftest import MakeConfig

EOD = 256


@pytest.fixture(autouse=True)
def _read_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read documents without `datasets`, which takes a second per source."""

    def documents(source: Source, **folders: Path) -> Iterator[str]:
        text = Path(source.path or "").read_text(encoding="utf-8")
        return iter([text] if source.format == "text" else [json.loads(line)["text"] for line in text.splitlines()])

    monkeypatch.setattr(cache, "documents", documents)


def write(path: Path, texts: list[str]) -> dict:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"name": path.stem, "path": str(path), "format": "jsonl"}


def texts_of(seed: int, count: int, largest: int = 60) -> list[str]:
    words = random.Random(seed)
    return [f"document {seed}/{n}: " + "ab " * words.randrange(5, largest) for n in range(count)]


def held_out(source: PreparedSource) -> list[str]:
    """Return the held-out documents."""
    tokens = np.asarray(source.validation)
    parts = np.split(tokens, np.flatnonzero(tokens == EOD) + 1)
    return [bytes(part[:-1].tolist()).decode() for part in parts[:-1]]


def text_of(tokens: np.ndarray) -> str:
    return "".join(chr(token) if token < EOD else "|" for token in tokens.tolist())


def trained_on(config: Config, sources: list[PreparedSource]) -> str:
    """Return all tokens that are read in the first epochs of all sources, as text."""
    loader = TrainLoader(sources, config, 0, 1)
    steps = 0
    while min(loader.epochs(steps).values()) < 1:
        steps += 1
    rows = [row for step in range(steps) for batch in loader.micro_batches(step) for row in batch.tolist()]
    return "\n".join(text_of(np.array(row)) for row in rows)


def check(config: Config) -> list[PreparedSource]:
    """Check that no sequence read for training has the beginning of a held-out document, which is its number."""
    sources = prepare(config)
    read = "\n".join([trained_on(config, sources), *(text_of(source.train) for source in sources)])
    for source in sources:
        for text in held_out(source):
            assert text.split(":")[0].strip() + ":" not in read, f"{source.name} holds out {text[:30]!r}"
    return sources


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_the_same_documents_in_sources_of_any_size(
    fraction: float, seed: int, tmp_path: Path, make_config: MakeConfig
) -> None:
    """A large source, small ones with parts of it in other orders and own text, and one whose whole text is in it."""
    everything = texts_of(seed, 300)
    pick = random.Random(seed)
    sources = [
        write(tmp_path / "large.jsonl", everything),
        write(tmp_path / "shuffled.jsonl", pick.sample(everything, len(everything))),
        write(tmp_path / "part.jsonl", pick.sample(everything, 20) + texts_of(100 + seed, 20)),
        write(tmp_path / "few.jsonl", pick.sample(everything, 4) + texts_of(200 + seed, 3)),
        write(tmp_path / "heavy.jsonl", pick.sample(everything, 10) + texts_of(300 + seed, 1, 5_000)),
    ]
    config = make_config(
        *sources,
        data={"validation_fraction": fraction, "seed": seed},
        train={"sequence_length": 32, "batch_tokens": 32 * 512},
    )
    large, shuffled, *_ = check(config)
    assert sorted(held_out(large)) == sorted(held_out(shuffled))
    for source in (large, shuffled):
        assert abs(source.validation_bytes / (source.train_bytes + source.validation_bytes) / fraction - 1) < 0.6
    assert sum(end - begin for begin, end in large.left_out) < 0.2 * large.train_tokens


def test_a_small_source_of_what_a_large_one_holds_out(tmp_path: Path, make_config: MakeConfig) -> None:
    """The small source alone would train on most of the held-out text, because it holds out only its fraction."""
    options = {
        "data": {"validation_fraction": 0.2},
        "train": {"sequence_length": 32, "batch_tokens": 32 * 512},
    }
    large = write(tmp_path / "large.jsonl", texts_of(0, 300))
    (alone,) = prepare(make_config(large, **options))
    small = write(tmp_path / "small.jsonl", held_out(alone) + texts_of(1, 30))
    _, source = check(make_config(large, small, **options))
    assert sum(end - begin for begin, end in source.left_out) > 2000


def test_white_space_at_the_ends_and_line_ends_do_not_make_another_document(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    texts = [text + "\nmore" for text in texts_of(0, 200, 40)]
    sources = [
        write(tmp_path / "a.jsonl", texts),
        write(tmp_path / "b.jsonl", [f"\ufeff {text}\n".replace("\n", "\r\n").lstrip("\ufeff") for text in texts]),
    ]
    config = make_config(*sources, data={"validation_fraction": 0.2}, train={"batch_tokens": 8 * 512})
    first, second = check(config)
    assert [text.split(":")[0] for text in held_out(first)] == [text.strip().split(":")[0] for text in held_out(second)]


def test_the_single_document_of_one_source_among_those_of_another(tmp_path: Path, make_config: MakeConfig) -> None:
    book = "".join(f"line {n} of the book: abc\n" for n in range(150))
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    single = {"name": "book", "path": str(tmp_path / "book.txt")}
    same = {"name": "again", "path": str(tmp_path / "book.txt")}
    outcomes = set()
    for seed in range(7):
        many = write(tmp_path / "many.jsonl", [*texts_of(0, 200), book.strip()])
        config = make_config(
            *(single, many, same),
            data={"validation_fraction": 0.2, "seed": seed},
            train={"sequence_length": 32, "batch_tokens": 32 * 512},
        )
        try:
            sources = prepare(config)
        except UserError as error:  # if the whole book is held out elsewhere, no part of it may be trained on
            outcomes.add(str(error).partition(" of its")[0])
            continue
        tail = held_out(sources[0])[0].splitlines()
        read = trained_on(config, sources)
        assert not any(line in read for line in tail[1:])
        assert held_out(sources[0]) == held_out(sources[2])
        assert sources[1].left_out
        outcomes.add("left out")
    assert outcomes == {"data.sources[book]: other sources hold out all", "left out"}


def test_large_sources_are_not_looked_through(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources without exceptions need no lookup; binary search and scan find the same documents."""
    sources = [write(tmp_path / f"{name}.jsonl", texts_of(seed, 2000, 20)) for seed, name in enumerate("ab")]
    config = make_config(*sources, train={"sequence_length": 32, "batch_tokens": 32 * 512})
    prepare(config)

    def fail(*args: object) -> None:
        raise AssertionError("looked through")

    for lookup in ("_scan", "_search"):
        monkeypatch.setattr(held_out_overlap.Documents, lookup, fail)
    assert [source.left_out for source in prepare(config)] == [(), ()]


@pytest.mark.parametrize("few", [0, 10_000])
def test_both_ways_of_looking_up_find_the_same(few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_overlap, "_MOST_SEARCHES", few)
    monkeypatch.setattr(held_out_overlap, "_BLOCK_DOCUMENTS", 8 if few == 0 else 0.001)
    hashes = np.random.default_rng(0).integers(0, 50, 300).astype(np.uint64)
    held_out_overlap.write_documents(tmp_path / "d", hashes, np.arange(1, 301))
    found = held_out_overlap.Documents(tmp_path / "d", 300).find(np.array([3, 7, 49, 60], dtype=np.uint64))
    ends = np.cumsum(np.arange(1, 301))
    expected = {
        (int(h), int(e - n), int(e)) for h, e, n in zip(hashes, ends, range(1, 301), strict=True) if h in (3, 7, 49)
    }
    assert {tuple(map(int, row)) for row in found} == expected
    assert len(found) == len(expected)


def test_the_bigram_model_does_not_learn_from_it_either(tmp_path: Path, make_config: MakeConfig) -> None:
    common = texts_of(1, 30)
    config = make_config(
        write(tmp_path / "a.jsonl", [*texts_of(2, 60), *common]),
        write(tmp_path / "b.jsonl", common),
        data={"validation_fraction": 0.3},
        train={"sequence_length": 16},
    )
    sources = prepare(config)
    assert any(source.left_out for source in sources)
    for source in sources:
        sequences = source.validation_file.read(0, 33).reshape(1, 33).astype(np.int64)
        whole = bigram_nats(source, 257, sequences)
        tokens = np.fromfile(source.folder / "train.bin", dtype=source.dtype)
        kept = np.delete(tokens, [t for b, e in source.left_out for t in range(b, e)])
        assert np.array_equal(kept, source.train)
        clean = tmp_path / f"clean_{source.name}"
        clean.mkdir()
        write_file(clean / "train.bin", kept.tobytes())
        other = PreparedSource(source.name, 1.0, clean, source.dtype, len(kept), 0, 0, 0, source.max_token)
        assert bigram_nats(other, 257, sequences) == whole
