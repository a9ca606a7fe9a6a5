"""Files of a folder or a glob that are read, each once, and the log of the others."""

import glob
import gzip
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.paths import expand_glob
from dsmoe.config.schema import Source
from dsmoe.data.corpora import documents
from dsmoe.data.corpus_files import corpus_files, find_files
from tests.helpers.privileges import without_override


def source(path: Path | str, format_: str = "jsonl", **keys: Any) -> Source:
    return Source(name="corpus", path=str(path), format=format_, **keys)


def read(path: Path | str, format_: str = "jsonl", **keys: Any) -> list[str]:
    return list(documents(source(path, format_, **keys), Path("unused")))


def write(folder: Path, *names: str) -> None:
    """Write files with one document each, the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(line) if name.lower().endswith(".gz") else line)


def test_all_cases_and_compressed_forms_of_a_format(tmp_path: Path) -> None:
    write(tmp_path, "D.JSONL", "a.jsonl", "b.jsonl.gz", "c.json", "e.NdJson", "F.Json.GZ", "sub/g.ndjson.gz")
    write(tmp_path, "a.txt", "B.TXT", "c.txt.gz", "notes.md")
    assert read(tmp_path) == ["D.JSONL", "F.Json.GZ", "a.jsonl", "b.jsonl.gz", "c.json", "e.NdJson", "sub/g.ndjson.gz"]
    assert [file.name for file in corpus_files(source(tmp_path, "text"))] == ["B.TXT", "a.txt", "c.txt.gz"]


def test_left_out_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.jsonl", "b.jsonl", "b.jsonl.gz", "README.md", "c.md", "d.jsonl.br", ".git/e.jsonl", "LICENSE")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with caplog.at_level(logging.INFO):
        assert read(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert caplog.messages == [
        f"data.sources[corpus].path: 2 files to read (2 .jsonl); left out: 2 .md ({tmp_path}/README.md, "
        f"{tmp_path}/c.md), 1 .br ({tmp_path}/d.jsonl.br), 1 compressed copies of what is read "
        f"({tmp_path}/b.jsonl.gz), 1 hidden ({tmp_path}/.git), 1 links that lead nowhere ({tmp_path}/gone.jsonl), "
        f"1 neither file nor folder ({tmp_path}/pipe.jsonl) and 1 more"
    ]


def test_the_line_has_a_bounded_length(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", *(f"{number}.{'x' * number}" for number in range(1, 200)))
    assert len(find_files(source(tmp_path)).summary()) < 6 * (len(str(tmp_path)) + 300)


def test_a_folder_without_fitting_files_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "b.csv")
    with pytest.raises(UserError, match=r"has no .txt file; .*left out: 2 .csv \(.*a.csv, .*b.csv\)"):
        read(tmp_path, "text")


def test_a_glob_that_matches_folders_says_so(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl/part-0.jsonl", "b.json")
    assert read(tmp_path / "*.json*") == ["b.json"]
    assert find_files(source(tmp_path / "*.json*")).left_out == {"folders": [tmp_path / "a.jsonl"]}
    with pytest.raises(UserError, match=r"no file matches the glob .*; left out: 1 folders \(.*a.jsonl\)"):
        read(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    ("mode", "pattern"),
    [
        *(
            (mode, pattern)
            for mode in (0o000, 0o444, 0o111)
            for pattern in ("*/*.jsonl", "**/*.jsonl", "*/[a-z].jsonl")
        ),
        *((0o000, pattern) for pattern in ("*/z.jsonl", "secret/*", "secret/**", "secret/z.jso*", "s*/**/z.jsonl")),
    ],
)
def test_a_glob_does_not_pass_over_a_folder_that_is_closed(mode: int, pattern: str, tmp_path: Path) -> None:
    write(tmp_path, "open/z.jsonl", "secret/z.jsonl")
    (tmp_path / "secret").chmod(mode)
    with without_override(), pytest.raises(UserError, match=r"secret\S* cannot be (listed|read) \(Permission denied\)"):
        read(tmp_path / pattern)
    (tmp_path / "secret").chmod(0o755)
    assert "secret/z.jsonl" in read(tmp_path / pattern)


def test_a_closed_folder_of_pythons_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.py", "shut/b.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "shut").chmod(0o000)
    with without_override(), pytest.raises(UserError, match=r"path: .*shut cannot be listed \(Permission denied\)"):
        find_files(source("builtin:python", "text"))
    (tmp_path / "shut").chmod(0o755)
    assert len(find_files(source("builtin:python", "text")).files) == 2


def test_a_glob_reads_through_a_folder_that_may_only_be_searched(tmp_path: Path) -> None:
    """A glob part without magic characters needs no permission to list the folder."""
    write(tmp_path, "shut/in/z.jsonl", "shut/file")
    (tmp_path / "shut").chmod(0o111)
    with without_override():
        assert read(tmp_path / "shut" / "in" / "*.jsonl") == ["shut/in/z.jsonl"]
        assert read(tmp_path / "sh*" / "in" / "*.jsonl") == ["shut/in/z.jsonl"]
        with pytest.raises(UserError, match=r"no file matches the glob"):
            read(tmp_path / "sh*" / "file" / "*.jsonl")
    (tmp_path / "shut").chmod(0o755)


def test_globs_match_what_pythons_do(tmp_path: Path) -> None:
    write(
        tmp_path, *("a.jsonl", "b/c.jsonl", "b/.h.jsonl", ".d/e.jsonl", "[x]/f.jsonl", "b/g/h.jsonl", "b/a?b/i.jsonl")
    )
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    patterns = [
        "*",
        "*/*",
        "*/c.jsonl",
        "b/*",
        "b/.*",
        ".*/*",
        "[[]x]/*",
        "[[]*/*",
        "*/*/*",
        "b/../*",
        "b/a[?]b/*",
        "gone/*",
    ]
    for pattern in [*patterns, "a.jsonl/*", "[ab]*", "[!a]*", "?", "b/g/h.jsonl", "nowhere/*"]:
        assert sorted(expand_glob(tmp_path / pattern)) == sorted(glob.glob(str(tmp_path / pattern))), pattern
    for pattern in ["**/*.jsonl", "b/**/*.jsonl", "*/**/*.jsonl", "**/g/*"]:
        expected = {path for path in glob.glob(str(tmp_path / pattern), recursive=True) if "/link" not in path}
        assert {path for path in expand_glob(tmp_path / pattern) if "/link" not in path} == expected, pattern


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "in", "a/x.jsonl", "z/y.jsonl", "real.jsonl")
    write(tmp_path / "elsewhere", "e.jsonl", "deep/d.jsonl")
    write(tmp_path / "blobs", "0123")
    inside = tmp_path / "in"
    (inside / "b").symlink_to("../elsewhere")  # a folder outside the corpus
    (inside / "c").symlink_to("../elsewhere/deep")  # a folder inside the first link
    (inside / "a" / "up").symlink_to("..")  # a circle
    (inside / "a" / "self").symlink_to("self")
    (inside / "0").symlink_to("z")  # a folder that is in the corpus as well
    (inside / "again.jsonl").symlink_to("real.jsonl")
    (inside / "blob.jsonl").symlink_to("../blobs/0123")  # a link to a file, as in the hub's cache
    (tmp_path / "elsewhere" / "back").symlink_to("../in")
    found = find_files(source(inside))
    assert [str(file.relative_to(inside)) for file in found.files] == [
        *("a/x.jsonl", "b/deep/d.jsonl", "b/e.jsonl", "blob.jsonl", "real.jsonl", "z/y.jsonl"),
    ]
    assert {reason: sorted(path.name for path in paths) for reason, paths in found.left_out.items()} == {
        "links to what is read already": ["0", "again.jsonl", "back", "c", "up"],
        "links that lead nowhere": ["self"],
    }


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", *(f"{folder}/{name}.jsonl" for folder in "abcd" for name in "xyz"), "b.jsonl")
    write(tmp_path / "elsewhere", *(f"{name}.jsonl" for name in "uvw"))
    for name in ("l", "k", "a/m"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "0.jsonl").symlink_to("a/x.jsonl")
    (tmp_path / "in" / "1.jsonl").symlink_to("a/x.jsonl")
    scandir = os.scandir
    shuffled = random.Random(0)

    class Shuffled:
        def __init__(self, path: Any):
            with scandir(path) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name)
            shuffled.shuffle(self._entries)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(self._entries)

        def __next__(self) -> Any:
            if not self._entries:
                raise StopIteration
            return self._entries.pop()

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    for path in (tmp_path / "in", tmp_path / "in" / "**" / "*.jsonl"):
        orders = {tuple(corpus_files(source(path))) for _ in range(20)}
        assert len(orders) == 1
        assert len(orders.pop()) == 4 * 3 + 1 + 3


def test_a_glob_through_circles_ends_and_reads_everything_once(tmp_path: Path) -> None:
    write(tmp_path, "a/x.jsonl", "b/y.jsonl", ".hidden/z.jsonl")
    for folder in "ab":
        for name in "pq":
            (tmp_path / folder / name).symlink_to("..")  # glob.glob would follow 2^40 paths
    assert read(tmp_path / "**" / "*.jsonl") == ["a/x.jsonl", "b/y.jsonl"]
    assert read(tmp_path / "**") == ["a/x.jsonl", "b/y.jsonl"]
    assert read(tmp_path / "*" / "**" / "[xy].jsonl") == ["a/x.jsonl", "b/y.jsonl"]


@pytest.mark.parametrize(
    "name",
    [
        *("part::0001.jsonl", "zip::a.jsonl", "a b.jsonl", "a\nb.jsonl", "[a]*?.jsonl", "*.jsonl", "**", "a?b=c.jsonl"),
        *("http:", "s3::x", "é\u0301.jsonl", "𝄞.jsonl", "a#b.jsonl", "%41.jsonl", "-.jsonl", "a.jsonl ", "'\".jsonl"),
        *("\u202eb.jsonl", "a\tb\r.jsonl", "~", "$HOME.jsonl", "a.jsonl.", "{a}.jsonl", "\\.jsonl"),
    ],
)
def test_odd_names_are_read_and_shown_on_one_line(name: str, tmp_path: Path) -> None:
    write(tmp_path, f"in/{name}")
    assert read(tmp_path / "in" / name) == [f"in/{name}"]
    assert read(tmp_path / "*" / "*") == [f"in/{name}"]
    if name.endswith(".jsonl"):
        assert read(tmp_path / "in") == [f"in/{name}"]
    (tmp_path / "in" / name).write_text("no JSON", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "in" / name)
    assert str(caught.value).isprintable()


def test_a_name_that_is_not_utf_8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (b"a\xff.jsonl", b"b.\xfe", b"c\xff.parquet"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b'{"text": "a"}\n')
    with caplog.at_level(logging.INFO):
        assert read(tmp_path) == read(tmp_path / "a*") == ["a"]
    assert "\\udcfe" in caplog.text
    with pytest.raises(UserError, match=r"c\\udcff.parquet is cut off or damaged"):
        read(tmp_path, "parquet")


def test_glob_characters_in_a_folder_that_exists(tmp_path: Path) -> None:
    write(tmp_path / "data [v1]", "a.jsonl", "b/c.jsonl")
    assert read(tmp_path / "data [v1]" / "*.jsonl") == ["a.jsonl"]
    assert read(tmp_path / "data [v1]" / "**" / "*.jsonl") == ["a.jsonl", "b/c.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe", r"pipe is neither file nor folder"),
        ("gone", r"gone is a link that leads nowhere"),
        ("x" * 300, r"xxx cannot be listed \(File name too long\)"),
        ("a\0b", r"there is no file or folder .*a\\x00b"),
    ],
)
def test_a_path_that_is_no_corpus(path: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match=message):
        read(tmp_path / path)


def test_a_folder_that_may_not_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jsonl", "secret/b.jsonl")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for path in (tmp_path, tmp_path / "**" / "*.jsonl"):
        with pytest.raises(UserError, match=r"secret cannot be listed \(Permission denied\)"):
            corpus_files(source(path))
