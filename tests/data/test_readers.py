"""Readers of odd but valid files and of invalid files, format by format."""

import bz2
import datetime
import decimal
import gzip
import json
import logging
import lzma
import struct
import tarfile
import tracemalloc
import uuid
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Source
from dsmoe.data import json_records
from dsmoe.data.corpora import corpus_state, documents
from dsmoe.data.precheck import source_problems
from dsmoe.data.source_errors import translated

TEXTS = [f"document {number} " + "ü" * number for number in range(300)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def read(path: Path, format_: str = "jsonl", **keys: Any) -> list[str]:
    return list(documents(Source(name="corpus", path=str(path), format=format_, **keys), Path("unused")))


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def put_table(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def by_arrow(data: bytes, codec: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"  # a zstd frame without content, as pzstd writes
HALVES = LINES[: len(LINES) // 2], LINES[len(LINES) // 2 :]
WHOLE = {
    "a.jsonl.gz": gzip.compress(LINES),
    "members.gz": gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]) + bytes(512),
    "a.jsonl.bz2": bz2.compress(HALVES[0]) + bz2.compress(HALVES[1]),
    "empty_streams.bz2": b"".join(map(bz2.compress, (b"", b"", HALVES[0], b"", HALVES[1], b""))),
    "empty_streams.xz": b"".join(map(lzma.compress, (b"", HALVES[0], b"", HALVES[1], b""))),
    "empty_streams.gz": b"".join(map(gzip.compress, (b"", HALVES[0], b"", HALVES[1], b""))),
    "empty_streams.zst": b"".join(by_arrow(part, "zstd") for part in (b"", HALVES[0], b"", HALVES[1], b"")),
    "empty_streams.lz4": b"".join(by_arrow(part, "lz4") for part in (b"", HALVES[0], b"", HALVES[1], b"")),
    "empty_stream_inside.jsonl": bz2.compress(b"") + bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(HALVES[0]) + bytes(8) + lzma.compress(HALVES[1]) + bytes(4),
    "a.jsonl.lzma": lzma.compress(LINES, format=lzma.FORMAT_ALONE),
    "a.jsonl.zst": SKIPPABLE + by_arrow(HALVES[0], "zstd") + SKIPPABLE + by_arrow(HALVES[1], "zstd"),
    "a.jsonl.zstd": by_arrow(LINES, "zstd"),
    "A.JSONL.ZST": by_arrow(LINES, "zstd"),
    "a.jsonl.lz4": by_arrow(HALVES[0], "lz4") + by_arrow(HALVES[1], "lz4"),
    "no_suffix": by_arrow(LINES, "zstd"),
    "gzip_inside.jsonl": gzip.compress(LINES),
    "zstd_inside.jsonl.gz": by_arrow(LINES, "zstd"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_compressed(name: str, tmp_path: Path) -> None:
    assert read(put(tmp_path / name, WHOLE[name])) == TEXTS
    if name not in ("a.jsonl.lzma", "a.jsonl.zst"):  # a format without magic first bytes
        assert read(put(tmp_path / "text.bin", WHOLE[name]), "text") == [LINES.decode()]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES) + b"junk"),
        ("a.jsonl.bz2", bz2.compress(LINES) + b"junk"),  # bz2.open ignores this damage
        ("a.jsonl.xz", lzma.compress(LINES) + b"junk"),  # lzma.open ignores this damage
        ("a.jsonl.bz2", bz2.compress(HALVES[0]) + b"C" + bz2.compress(HALVES[1])[1:]),  # half the text is lost
        ("a.jsonl.xz", lzma.compress(HALVES[0]) + b"\xfe" + lzma.compress(HALVES[1])[1:]),
        ("a.jsonl.zst", by_arrow(LINES, "zstd") + b"junk"),
        ("a.jsonl.gz", LINES),
        ("a.jsonl.bz2", LINES),
        ("a.jsonl.xz", LINES),
        ("a.jsonl.zst", LINES),
        *((f"empty.jsonl.{suffix}", b"") for suffix in ("gz", "bz2", "xz", "zst", "lz4")),
        *((name, data[:-13]) for name, data in WHOLE.items() if name not in ("a.jsonl.xz", "members.gz")),
    ],
)
def test_damaged_compression_names_the_file(name: str, data: bytes, tmp_path: Path) -> None:
    path = put(tmp_path / name, data)
    with pytest.raises(UserError, match=rf"^data.sources\[corpus\].path: {path} is cut off"):
        read(path)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "gzip", "bz2"])
def test_every_cut_shows(codec: str, tmp_path: Path) -> None:
    whole = by_arrow(LINES * 4, codec)
    path = tmp_path / f"a.jsonl.{ {'zstd': 'zst', 'gzip': 'gz'}.get(codec, codec) }"
    for size in range(0, len(whole), len(whole) // 50):
        with pytest.raises(UserError, match="is cut off"):
            read(put(path, whole[:size]))


def test_zip(tmp_path: Path) -> None:
    names = ["b.jsonl", "c.jsonl", "a/1.jsonl", "b/a/2.jsonl"]  # the files of a folder precede those of its subfolders
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(names):
            archive.writestr(name, json.dumps({"text": name}))
        archive.writestr("__MACOSX/a.jsonl", b"\xff")
    assert read(tmp_path / "a.zip") == names


def make_zip(path: Path, *names: str) -> Path:
    """Write a zip archive whose members have one document each, their name and number."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for number, name in enumerate(names):
            archive.writestr(name, "" if name.endswith("/") else json.dumps({"text": f"{name} {number}"}))
    return path


def test_left_out_members_of_a_zip_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (
        "a.jsonl",
        "./b.jsonl",
        "x/../c.jsonl",
        "../d.jsonl",
        "/e.jsonl",
        ".x/f.jsonl",
        "x/.g.jsonl",
        "x/",
        "__MACOSX/h",
    )
    path = make_zip(tmp_path / "a.zip", *names)
    with caplog.at_level(logging.INFO):
        texts = read(path)
    assert sorted(texts) == sorted(f"{name} {number}" for number, name in enumerate(names[:5]))
    assert f"{path}: left out: 3 hidden (.x/f.jsonl, __MACOSX/h)" in caplog.messages


@pytest.mark.parametrize("other", ["a.jsonl", "./a.jsonl", "x/../a.jsonl", "/a.jsonl", "x//../a.jsonl", "a.jsonl\0b"])
def test_a_zip_with_two_files_of_one_name(other: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", "b.jsonl", "a.jsonl", other)
    with pytest.raises(UserError, match=rf"{path}: 2 of its files are called a.jsonl, .* with different names"):
        read(path)


def test_joined_zips(tmp_path: Path) -> None:
    """The central directory of an archive finds only the last of joined archives."""
    path, other = make_zip(tmp_path / "a.zip", "a.jsonl"), make_zip(tmp_path / "b.zip", "b.jsonl")
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match=rf"{path}: something stands before its first file, .*; unpack it"):
        read(path)


def test_archives_are_not_taken_for_text(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"text")
    for name in ("b.tar", "b.tar.gz", "b.txt.xz"):
        with tarfile.open(tmp_path / name, f"w:{'' if name == 'b.tar' else name[-2:]}") as archive:
            archive.add(tmp_path / "a.txt")
        with pytest.raises(UserError, match=rf"{tmp_path}/{name} is a tar archive; unpack it"):
            read(tmp_path / name, "text")
    with zipfile.ZipFile(tmp_path / "b.docx", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    with pytest.raises(UserError, match=r"b.docx is a zip archive; unpack it, or end its name in .zip"):
        read(tmp_path / "b.docx", "text")


def test_a_damaged_name_in_a_zip_is_not_taken_for_a_hidden_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("n.jsonl", '{"text": "one"}')
        archive.writestr("o.jsonl", '{"text": "two"}')
    data = (tmp_path / "a.zip").read_bytes()
    place = data.rindex(b"n.jsonl")
    put(tmp_path / "a.zip", data[:place] + b"." + data[place + 1 :])
    with pytest.raises(UserError, match=r"a.zip is cut off or damaged \(File name in directory"):
        read(tmp_path / "a.zip")


def test_not_utf_8_inside_names_line_and_byte_of_the_text(tmp_path: Path) -> None:
    data = b'{"text": "a"}\r\n\n{"text": "caf\xe9"}\n{"text": "b"}\n'
    for path in (put(tmp_path / "a.jsonl.gz", gzip.compress(data)), put(tmp_path / "a.jsonl", data)):
        with pytest.raises(UserError, match=rf"{path} is not UTF-8 at byte 29, line 3; convert it"):
            read(path)
        assert read(path, bad_records="skip") == ["a", "b"]
    with pytest.raises(UserError, match=r"line 1; convert it, it begins like UTF-16: iconv -f UTF-16"):
        read(put(tmp_path / "b.jsonl", data.decode("latin-1").encode("utf-16")))


def old_tar(name: str, data: bytes) -> bytes:
    """A tar header of version 7, which has no magic number."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[257:] = bytes(512 - 257)
    return bytes(header) + data.ljust(10240, b"\0")


NOT_TEXT = {
    "utf-16-le": "if that is UTF-16LE, convert it: iconv -f UTF-16LE -t UTF-8",
    "utf-16-be": "if that is UTF-16BE, convert it: iconv -f UTF-16BE -t UTF-8",
    "utf-32-le": "if that is UTF-32LE, convert it: iconv -f UTF-32LE -t UTF-8",
    "utf-32-be": "if that is UTF-32BE, convert it: iconv -f UTF-32BE -t UTF-8",
    "nulls": "null characters stand in the place of its text, as after a crash",
    "tar": "get it again, or take it out of the corpus",
}


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize("compress", [False, True])
def test_a_text_file_without_text(kind: str, compress: bool, tmp_path: Path) -> None:
    text = "The quick brown fox\n" * 2000
    odd = {"nulls": bytes(20_000), "tar": old_tar("a.txt", text.encode())}
    data = odd[kind] if kind in odd else text.encode(kind)
    path = put(tmp_path / "a.txt", gzip.compress(data) if compress else data)
    with pytest.raises(UserError, match=rf"{path} is no text: byte .*, is a null character; {NOT_TEXT[kind]}"):
        read(path, "text")
    (problem,) = source_problems(Source(name="corpus", path=str(path)), tmp_path)
    assert f"{path} is no text" in problem  # before anything is tokenised
    put(tmp_path / "b.txt", b"text")
    assert read(tmp_path, "text", bad_records="skip") == ["text"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_records_of_another_encoding(encoding: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", ('{"text": "a"}\n' * 9).encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(UserError, match=rf"{path} is no text: byte [0-3], line 1, is .* iconv -f {name} -t UTF-8"):
        read(path)


def test_null_characters_after_records(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b"}\n' + bytes(2000))
    with pytest.raises(UserError, match=rf"{path} is no text: byte 28, line 3, is .* as after a crash"):
        read(path)
    assert read(path, bad_records="skip") == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_mark_tells_the_encoding(encoding: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "déjà".encode(encoding))
    with pytest.raises(UserError, match=f"it begins like {encoding.upper()}: iconv -f {encoding.upper()} -t UTF-8"):
        read(path, "text")


def test_a_null_character_late_in_a_text(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", b"line\n" * 100_000 + b"a\0b")
    with pytest.raises(UserError, match="byte 500001, line 100001, is a null character"):
        read(path, "text")


def test_bad_records_are_skipped_and_counted_where_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"text": "a"}', '{"text": null}', "{", "[]", '{"Text": "b"}', '{"text": "\\ud800"}', '{"text": "c"}', " "]
    path = put(tmp_path / "a.jsonl", "\n".join(lines).encode())
    with pytest.raises(UserError, match=r"a.jsonl:2: field 'text' is null, not a string; .* `bad_records: skip`"):
        read(path)
    with caplog.at_level(logging.WARNING):
        assert read(path, bad_records="skip") == ["a", "c"]
    assert caplog.messages == [
        "data.sources[corpus].bad_records: 5 bad records were skipped, the first: "
        f"{path}:2: field 'text' is null, not a string"
    ]
    with pytest.raises(UserError, match=r"has no text in it; 8 bad records were skipped, the first: .*no field 'body'"):
        read(put(path, b'{"text": "a"}\n' * 8), bad_records="skip", text_field="body")


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"caf\xe9")
    put(tmp_path / "b.txt", b"\xef\xbb\xbfb\xef\xbb\xbf\r\n")
    assert read(tmp_path, "text", bad_records="skip") == ["b\ufeff\n"]


def test_the_default_policy_leaves_caches_as_they_are(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", b"a")
    state = corpus_state(Source(name="corpus", path=str(path)))
    assert set(state) == {"name", "path", "hub", "split", "format", "text_field", "num_files", "files"}
    assert "bad_records" in corpus_state(Source(name="corpus", path=str(path), bad_records="skip"))


def test_byte_order_marks_of_joined_files(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b\\ufeff"}\r\n\xef\xbb\xbf\xef\xbb\xbf{"text": "c"}'
    assert read(put(tmp_path / "a.jsonl", data)) == ["a", "b\ufeff", "c"]


def test_old_line_ends(tmp_path: Path) -> None:
    for end in (b"\r", b"\r\n", b"\n\r\n\n"):
        assert read(put(tmp_path / "a.jsonl", LINES.replace(b"\n", end))) == TEXTS
    path = put(tmp_path / "a.jsonl", LINES.replace(b"\n", b"\r") + b"{")
    with pytest.raises(UserError, match=r"a.jsonl:301: not JSON"):
        read(path)


@pytest.mark.parametrize("depth", [99, 100, 101, 200, 201, 900, 10_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"text":', "}"), ('[{"]":', "}]")])
def test_deep_nesting_beside_the_text(depth: int, opening: str, closing: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    nested = f'{opening * depth}"[\\"{{"{closing * depth}'
    put(path, f'{{"a": {nested}, "text": "a", "b": {nested}}}\n{{"text": "b"}}'.encode())
    assert read(path) == ["a", "b"]
    if depth < 900:
        return
    for wrong in (
        nested[:-1],
        nested + closing,
        nested.replace('"[\\"{"', "1 2"),
        nested.replace(closing, "]", 1) + "}",
    ):
        put(path, f'{{"a": {wrong}, "text": "a"}}\n{{"text": "b"}}'.encode())
        with pytest.raises(UserError, match=r"a.jsonl:1: not JSON"):
            read(path)


def test_numbers_of_any_length_beside_the_text(tmp_path: Path) -> None:
    data = f'{{"n": {"9" * 5000}, "text": "a"}}\n{{"text": "b", "n": [-{"1" * 99_999}, 1e9999]}}'
    assert read(put(tmp_path / "a.jsonl", data.encode())) == ["a", "b"]
    with pytest.raises(UserError, match=r"a.jsonl:1: field 'text' is a number, not a string"):
        read(put(tmp_path / "a.jsonl", f'{{"text": {"9" * 5000}}}'.encode()))


def test_names_of_fields_in_messages_are_short_and_printable(tmp_path: Path) -> None:
    fields = {"\ud800\n": 1, "x" * 10_000: 1, **{str(number): 1 for number in range(1000)}}
    with pytest.raises(UserError) as caught:
        read(put(tmp_path / "a.jsonl", json.dumps(fields).encode()))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("compress", [False, True])
def test_one_array(indent: int | None, compress: bool, tmp_path: Path) -> None:
    hard = [*TEXTS, '"],[{}', "\\", '\\"', "x" * 3_000_000]
    records = [{"a": [{"b": "],"}, []], "text": text, "c": {}} for text in hard]
    data = b"\xef\xbb\xbf \n" + json.dumps(records, indent=indent, ensure_ascii=False).encode() + b"\n \n"
    path = put(tmp_path / ("a.JSON.gz" if compress else "a.json"), gzip.compress(data) if compress else data)
    assert read(path) == hard


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps([{"text": text, "a": ['\\"', {}]} for text in TEXTS[:20]], ensure_ascii=False).encode()
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(json_records, "_CHUNK", size)
        assert read(put(tmp_path / "a.json", data)) == TEXTS[:20]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}', r"a.json is cut off: the array has no end, in item 1"),
        ('[{"text": "a"}, {"text": "b', r"a.json is cut off: the array has no end, in item 2"),
        ('[{"text": "a"}] x', r"a.json: there is more after the end of the array"),
        ('[{"text": "a"}][{"text": "b"}]', r"there is more after the end"),
        ('[{"text": "a"},]', r"a.json, item 2: not JSON"),
        ('[{"text": "a"},{"text" 1},{"text": "c"}]', r"a.json, item 2: not JSON"),
        ('[{"text": "a"},[{"text": "b"}]]', r"a.json, item 2: a JSON list, where an object was expected"),
        ('[{"text": "a"},{"text": 1}]', r"a.json, item 2: field 'text' is a number, not a string"),
        ('[{"text": "a"},{"text": "\xe9"}]', r"a.json is not UTF-8 at byte 25"),
        ('{\n"text": "a"\n}', r"a.json:1: not JSON .* one array in a .json file"),
        (" [ ] ", r"a.json has no text in it"),
    ],
)
def test_arrays_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_an_array_that_ends_like_an_object(policy: str, tmp_path: Path) -> None:
    """An array that was cut out of a larger object."""
    path = put(tmp_path / "a.json", b'[{"text": "a"}, {"text": "b"}}')
    with pytest.raises(UserError, match=rf"{path}: the array ends with }}, after item 1, not with \]"):
        read(path, bad_records=policy)
    for data in (b'[{"text": "a"], {"text": "b"}]', b'[{"text": "a", "x": [1}}, {"text": "b"}]'):
        with pytest.raises(UserError, match="item 1: not JSON"):
            read(put(path, data))


def test_a_bad_item_is_skipped(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", b'[{"text": "a"},{"text" 1},null,{"text": "c"}]')
    assert read(path, bad_records="skip") == ["a", "c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_memory_holds_a_small_part_of_a_file(name: str, tmp_path: Path) -> None:
    line = json.dumps({"text": "some words " * 800})
    data = ("[" + ",\n".join([line] * 3000) + "]" if name == "a.json" else (line + "\n") * 3000).encode()
    assert len(data) > 25_000_000
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    packed = by_arrow(data, codec) if codec else lzma.compress(data, preset=0) if name.endswith(".xz") else data
    path = put(tmp_path / name, packed)
    del data, packed
    tracemalloc.start()
    try:
        texts = documents(Source(name="corpus", path=str(path), format="jsonl"), Path("unused"))
        assert sum(1 for _ in texts) == 3000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "RECORD_LIMIT", 1000)
    with pytest.raises(UserError, match=r"a.jsonl:2: a line of more than"):
        read(put(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "' + b"b" * 5000))


def test_columns_that_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    count = len(TEXTS)
    columns = {
        "map": pyarrow.array([[("a", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "decimal": pyarrow.array([decimal.Decimal("1.5")] * count),
        "uuid": pyarrow.array([uuid.uuid4().bytes] * count, pyarrow.uuid()),
        "nested": [{"text": {"y": [[1]]}}] * count,
        "duration": [datetime.timedelta(1)] * count,
        "nothing": pyarrow.nulls(count),
        "text.a": ["no"] * count,
        "text": TEXTS,
    }
    assert read(put_table(tmp_path / "a.parquet", columns), "parquet") == TEXTS


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "json"])
def test_every_column_of_strings(kind: str, tmp_path: Path) -> None:
    text = pyarrow.array(TEXTS)
    if kind == "dictionary":
        text = text.dictionary_encode()
    elif kind == "json":
        text = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), text)
    else:
        text = text.cast(getattr(pyarrow, kind)())
    assert read(put_table(tmp_path / "a.parquet", {"text": text}), "parquet") == TEXTS


def test_parts_without_rows_are_skipped_whatever_their_columns(tmp_path: Path) -> None:
    put_table(tmp_path / "0.parquet", {"text": pyarrow.array([], pyarrow.string())})
    put_table(tmp_path / "1.parquet", {"text": pyarrow.array([], pyarrow.int64())})
    put_table(tmp_path / "2.parquet", {"text": pyarrow.nulls(0)})
    put_table(tmp_path / "3.parquet", {})
    put_table(tmp_path / "4.parquet", {"text": ["a"]})
    assert read(tmp_path, "parquet") == ["a"]


def test_rows_without_text(tmp_path: Path) -> None:
    damaged = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"\xff", b"c"]).buffers())
    for column, message in (
        (["a", None, "c"], "row 1: field 'text' is null, not a string"),
        (damaged, "row 1: not UTF-8"),
    ):
        path = put_table(tmp_path / "a.parquet", {"text": column})
        with pytest.raises(UserError, match=rf"text_field: {path}, {message}; mend it, or set `bad_records: skip`"):
            read(path, "parquet")
        assert read(path, "parquet", bad_records="skip") == ["a", "c"]


def test_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: 2 fields are called 'text'"):
        read(tmp_path, "parquet")


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_a_damaged_page_names_the_file(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=False, write_page_checksum=True)
    assert read(path, "parquet") == TEXTS
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    put(path, bytes(data))
    with pytest.raises(UserError, match=rf"{path} is cut off or damaged"):
        read(path, "parquet")


def test_only_the_text_column_is_read(tmp_path: Path) -> None:
    """Damage in other columns is not read."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"other": ["x" * 50_000], "text": ["a"]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    assert read(put(path, bytes(data)), "parquet") == ["a"]


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", LINES)
    texts = documents(Source(name="corpus", path=str(path), format="jsonl"), Path("unused"))
    next(texts)
    with path.open("ab") as file:  # a download in progress appends to the file
        file.write(LINES)
    with pytest.raises(UserError, match=rf"{path} changed while it was read; run again when it is complete"):
        list(texts)


def test_errors_of_the_system(tmp_path: Path) -> None:
    source = Source(name="corpus", path="a")
    with (
        pytest.raises(UserError, match=r"path: /c/a cannot be read \(Permission denied\)"),
        translated(source, Path("/c/a")),
    ):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OSError, match="Input/output error") as caught, translated(source, Path("/c/a")):
        raise OSError(5, "Input/output error")  # an error of storage that may recover
    assert caught.value.filename == "/c/a"
