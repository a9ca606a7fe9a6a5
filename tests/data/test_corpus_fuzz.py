"""Corpora damaged at random give the same documents or one error that names the file, never silently other documents.

Damage that no reader can detect is accepted: a change in uncompressed text or in a block without checksum makes other
text, and a file cut between two whole streams is a whole file. Such text is compared with a second, simple reader.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import xxhash

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Source
from dsmoe.data.corpora import documents
from dsmoe.data.precheck import source_problems

RUNS = [pytest.param(0, 20, id="short"), pytest.param(1, 2000, id="long", marks=pytest.mark.fuzz)]
WORDS = ["alpha", "beta", "γάμμα", "delta,", '"quoted"', "back\\slash", "[brackets]", "{braces}", "𝄞", "line\nend"]


def some_texts(rng: random.Random, count: int) -> list[str]:
    return [f"document {number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for number in range(count)]


def sealed_zstd(data: bytes) -> bytes:
    """Return a frame with a checksum of its content, as the `zstd` program writes it and pyarrow does not."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    frame = bytearray(sink.getvalue().to_pybytes())
    frame[4] |= (
        0b100  # https://github.com/facebook/zstd/blob/dev/doc/zstd_compression_format.md#frame_header_descriptor
    )
    return bytes(frame) + xxhash.xxh64_intdigest(data).to_bytes(8, "little")[:4]


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.jsonl", data)
    return sink.getvalue()


SEALED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": sealed_zstd,
}


def jsonl(texts: list[str]) -> bytes:
    return b"".join(
        json.dumps({"n": number, "text": text, "meta": {"x": [1.5, None]}}, ensure_ascii=number % 2 == 0).encode()
        + b"\n"
        for number, text in enumerate(texts)
    )


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, drop, repeat or append."""
    changed = bytearray(data)
    position = rng.randrange(len(data))
    damage = rng.randrange(8)
    if damage <= 1:
        changed[position] ^= 1 << rng.randrange(8)
    elif damage == 2:
        changed[: rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
    elif damage == 3:
        del changed[position:]
    elif damage == 4:
        del changed[position : position + rng.randint(1, 50)]
    elif damage == 5:
        changed[position:position] = changed[position : position + rng.randint(1, 50)]
    elif damage == 6:
        changed += rng.choice([b"junk", b"\0\0\0\0", b"\xff", data[:40], rng.randbytes(30)])
    else:
        changed[position : position + 16] = bytes(min(16, len(data) - position))
    return bytes(changed)


def outcome(path: Path, cache: Path, **keys: Any) -> list[str] | None:
    """Return the documents, or None for a one-line error that names the file; anything else fails the test."""
    source = Source(name="fuzz", path=str(path), **keys)
    try:
        problems = source_problems(source, cache)
    except UserError as error:
        problems = [str(error)]
    try:
        texts = list(documents(source, cache))
    except UserError as error:
        message = str(error)
        assert str(path) in message, message
        assert message.isprintable()
        assert len(message) < 4000
        return None
    assert not problems, f"read, but the first look says {problems}"
    return texts


def plain_reading(data: bytes) -> list[str] | None:
    """Read uncompressed jsonl in the simplest way; None if the file is not valid jsonl."""
    try:
        lines = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        texts = [json.loads(line.lstrip("\ufeff"))["text"] for line in lines if line.strip()]
        for text in texts:
            text.encode("utf-8")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return [text for text in texts if text.strip()] or None


@pytest.mark.parametrize("suffix", SEALED)
@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_compressed_and_sealed(seed: int, count: int, suffix: str, tmp_path: Path) -> None:
    rng = random.Random(f"{seed} {suffix}")
    texts = some_texts(rng, 30)
    data = jsonl(texts)
    middle = data.index(b"\n", len(data) // 2) + 1
    pack = SEALED[suffix]
    first = pack(data[:middle])
    path = tmp_path / f"a.jsonl{suffix}"
    seen: Counter[str] = Counter()
    for good in (pack(data), first + pack(data[middle:])):
        path.write_bytes(good)
        assert outcome(path, tmp_path, format="jsonl") == texts
        for _ in range(count // 2):
            bad = damaged(good, rng)
            path.write_bytes(bad)
            found = outcome(path, tmp_path, format="jsonl")
            if bad.rstrip(b"\0") == first.rstrip(b"\0"):
                continue  # cut between two streams
            assert found in (None, texts)
            seen["refused" if found is None else "the same documents"] += 1
    assert seen["refused"] > count / 2
    print(suffix, dict(seen))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_compressed_without_a_checksum(seed: int, count: int, codec: str, tmp_path: Path) -> None:
    rng = random.Random(f"{seed} {codec}")
    texts = some_texts(rng, 30)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(jsonl(texts))
    good = sink.getvalue().to_pybytes()
    path = tmp_path / f"a.jsonl.{codec}"
    for _ in range(count):  # every cut shows
        path.write_bytes(good[: rng.randrange(len(good))])
        assert outcome(path, tmp_path, format="jsonl") is None
    for _ in range(count):
        path.write_bytes(damaged(good, rng))
        found = outcome(path, tmp_path, format="jsonl")
        if found not in (None, texts):
            with pyarrow.CompressedInputStream(pyarrow.BufferReader(path.read_bytes()), codec) as stream:
                assert found == plain_reading(stream.read())


@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_damaged_plain_jsonl_is_read_as_it_is(seed: int, count: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    data = jsonl(some_texts(rng, 6))
    path = tmp_path / "a.jsonl"
    seen: Counter[str] = Counter()
    for _ in range(count * 2):
        bad = damaged(data, rng)
        if rng.random() < 0.3:
            bad = bad.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))
        path.write_bytes(bad)
        expected = plain_reading(bad)
        assert outcome(path, tmp_path, format="jsonl") == expected
        seen["refused" if expected is None else "read as it is"] += 1
    assert min(seen.values()) > 5
    print(dict(seen))


@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_damaged_plain_text_is_read_as_it_is(seed: int, count: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    data = "\r\n".join(some_texts(rng, 3)).encode()
    path = tmp_path / "a.txt"
    for _ in range(count):
        bad = damaged(data, rng)
        path.write_bytes(bad)
        try:
            text = bad.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            expected = [text] if text.strip() and "\0" not in text else None
        except UnicodeDecodeError:
            expected = None
        assert outcome(path, tmp_path) == expected


@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_one_array(seed: int, count: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.json"
    for _ in range(count * 2):
        records = [json.loads(line) for line in jsonl(some_texts(rng, 4)).splitlines()]
        good = json.dumps(records, indent=rng.choice([None, 0, 2]), ensure_ascii=False).encode()
        bad = damaged(good, rng)
        path.write_bytes(bad)
        if not bad.lstrip().startswith(b"["):
            expected = plain_reading(bad)
        else:
            try:
                texts = [record["text"] for record in json.loads(bad.decode("utf-8"))]
                expected = texts if all(isinstance(text, str) for text in texts) and any(texts) else None
            except (ValueError, TypeError, KeyError):
                expected = None
        assert outcome(path, tmp_path, format="jsonl") == expected


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_parquet_with_checksums(seed: int, count: int, compression: str, tmp_path: Path) -> None:
    rng = random.Random(f"{seed} {compression}")
    texts = some_texts(rng, 40)
    table = pyarrow.table({"n": list(range(40)), "text": texts, "m": [{"a": text} for text in texts]})
    path = tmp_path / "a.parquet"
    seen: Counter[str] = Counter()
    for dictionary in (True, False):
        pyarrow.parquet.write_table(
            table,
            path,
            compression=compression,
            use_dictionary=dictionary,
            row_group_size=15,
            write_page_checksum=True,
        )
        good = path.read_bytes()
        assert outcome(path, tmp_path, format="parquet") == texts
        for _ in range(count // 2):
            path.write_bytes(damaged(good, rng))
            found = outcome(path, tmp_path, format="parquet")
            assert found in (None, texts)
            seen["refused" if found is None else "the same documents"] += 1
    assert seen["refused"] > count / 4
    print(compression, dict(seen))


@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_zip(seed: int, count: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    texts = some_texts(rng, 30)
    good = zipped(jsonl(texts))
    path = tmp_path / "a.jsonl.zip"
    for _ in range(count):
        path.write_bytes(damaged(good, rng))
        assert outcome(path, tmp_path, format="jsonl") in (None, texts)


def hostile_record(rng: random.Random, text: str) -> tuple[str, bool]:
    """Return a line of jsonl, and whether it has a usable text."""
    depth = rng.choice([50, 99, 100, 101, 500, 2_000, 20_000])
    opening, closing = rng.choice([("[", "]"), ('{"text":', "}"), ('[{"a":', "}]")])
    nested = opening * depth + rng.choice(["0", '"]}\\""', "null"]) + closing * depth
    digits = rng.choice("123456789") * rng.choice([4300, 4301, 5000, 100_000])
    spelt = json.dumps(text)
    return rng.choice(
        [
            (f'{{"text": {spelt}, "deep": {nested}}}', True),
            (f'{{"deep": {nested}, "text": {spelt}, "more": {nested}}}', True),
            (f'{{"deep": {nested[:-1]}, "text": {spelt}}}', False),
            (f'{{"deep": {nested}{closing}, "text": {spelt}}}', False),
            (f'{{"deep": {opening * depth}1 2{closing * depth}, "text": {spelt}}}', False),
            (f'{{"text": {nested}}}', False),
            (nested, False),
            (f'{{"number": {digits}, "text": {spelt}}}', True),
            (f'{{"number": -{digits}, "deep": {nested}, "text": {spelt}}}', True),
            (f'{{"text": {digits}}}', False),
            (f'{{"number": 1e999999, "other": NaN, "text": {spelt}}}', True),
            (f'{{"text": null, "text": {spelt}}}', True),
            (f'{{"text": {spelt}, "text": null}}', False),
            (f"\ufeff\ufeff {{'text': {spelt}}}".replace("'", '"', 2), True),
            ('{"text": "\\ud800"}', False),
            (f'{{"\\udfff": "\\ud800", "text": {spelt}}}', True),
            ('{"text": "\x00"}', False),
            ('{"text": true}', False),
            ('{"Text": "a"}', False),
            (f'{{"text": {spelt}', False),
            (f'{{"text": {spelt}}} {{"text": "b"}}', False),
            ("{}", False),
            ("[]", False),
            ('"text"', False),
            ("null", False),
            (digits, False),
            ("\x00\x00\x00", False),
            ("{" + '"a":' * 1000, False),
            ('{"' + "k" * 10_000 + '": 1}', False),
            ("\\" * 999 + '"', False),
        ]
    )


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize(("seed", "count"), RUNS)
def test_hostile_json(seed: int, count: int, array: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{seed} {array}")
    path = tmp_path / ("a.json" if array else "a.jsonl")
    seen: Counter[str] = Counter()
    for _ in range(count):
        texts = some_texts(rng, 4)
        place = rng.randrange(4)
        lines = [json.dumps({"text": text}) for text in texts]
        lines[place], usable = hostile_record(rng, texts[place])
        if array:
            if not usable and lines[place].count('"') % 2 == 0:
                lines[place] = '{"text": 1}'  # invalid JSON may end the array
            elif not usable:
                continue
            path.write_text("[" + ",\n".join(line.replace("\ufeff", "") for line in lines) + "]", encoding="utf-8")
        else:
            path.write_text("\n".join(lines), encoding="utf-8")
        found = outcome(path, tmp_path, format="jsonl")
        assert found == (texts if usable else None)
        others = texts if usable else [*texts[:place], *texts[place + 1 :]]
        assert outcome(path, tmp_path, format="jsonl", bad_records="skip") == others
        seen["read" if usable else "refused, and skipped where asked"] += 1
    assert len(seen) == 2
    print(dict(seen))
