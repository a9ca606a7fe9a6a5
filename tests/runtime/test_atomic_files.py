"""A file that is replaced has the old content or the new one, whatever fails or ends in between; nothing is left."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dsmoe.runtime import atomic_files
from dsmoe.runtime.atomic_files import (
    NotAFileError,
    check_regular,
    publish_folder,
    remove_leftovers,
    sync_file,
    sync_folder,
    write_synced,
    write_whole,
)
from tests.helpers.sources import sources


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs any more."""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", ["config.yaml", "a b\n.yaml", "-rf", "ünï" * 50, "." * 3 + "x"])
def test_the_content_is_there_and_nothing_else(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, "first\n")
    write_whole(tmp_path / name, "second ü\n")
    assert (tmp_path / name).read_text(encoding="utf-8") == "second ü\n"
    write_whole(tmp_path / name, b"\xff\x00")
    assert (tmp_path / name).read_bytes() == b"\xff\x00"
    assert names(tmp_path) == [name]


def test_content_then_name_then_folder_are_forced_onto_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("sync folder" if path == tmp_path else f"sync {path.read_text(encoding='utf-8')}")
        fsync(descriptor)

    def noted_replace(source: Any, target: Any) -> None:
        done.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "config.yaml", "text")
    assert done == ["sync text", "rename to config.yaml", "sync folder"]


@pytest.mark.parametrize("operation", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_what_fails_leaves_what_was_there_and_is_named(
    operation: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "before")

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing)
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            write_whole(path, "after")
    assert (raised.value.errno, raised.value.filename) == (number, str(path))
    assert path.read_text(encoding="utf-8") == "before"
    assert names(tmp_path) == ["config.yaml"]


def test_whatever_operation_is_the_last_one_the_file_is_whole(tmp_path: Path) -> None:
    for operations in range(5):
        folder = tmp_path / str(operations)
        folder.mkdir()
        path = folder / "config.yaml"
        write_whole(path, "before")
        with pytest.MonkeyPatch.context() as patch:
            left = [operations]

            def counted(operation: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
                def run(*arguments: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return operation(*arguments, **options)

                return run

            for name in ("open", "fsync", "replace", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            with suppress(Killed):
                write_whole(path, "after")
        assert path.read_text(encoding="utf-8") == ("before" if operations < 3 else "after")
        remove_leftovers(folder)
        assert names(folder) == ["config.yaml"]


def test_only_leftovers_of_our_own_names_are_removed(tmp_path: Path) -> None:
    kept = [
        ".config.yaml.swp",
        "config.yaml.partial",
        ".config.yaml.partial",
        ".config.yaml.12345.partial",
        ".x.zzzzzzzz.partial",
    ]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".folder.0123abcd.partial").mkdir()
    (tmp_path / ".config.yaml.0123abcd.partial").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, ".folder.0123abcd.partial"])
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("taken", ["config.yaml.partial", ".config.yaml.partial", ".config.yaml.tmp"])
def test_nothing_is_in_the_way(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).mkdir()
    write_whole(tmp_path / "config.yaml", "text")
    assert names(tmp_path) == sorted([taken, "config.yaml"])


def test_a_link_is_followed_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    for text in ("first", "second"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text(encoding="utf-8") == text
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text(encoding="utf-8")))
    reader.start()
    write_whole(tmp_path / "pipe", "through a pipe")
    reader.join()
    assert read == ["through a pipe"]
    assert (tmp_path / "pipe").is_fifo()
    write_whole(Path("/dev/null"), "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "")
        write_whole(tmp_path / "script", "", 0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "script").stat().st_mode) == 0o750


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_no_error(
    number: int, is_raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files.os, "fsync", failing)
    if is_raised:
        with pytest.raises(OSError, match=str(tmp_path)):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)


def test_writing_without_a_name_of_its_own_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"manifest\.json"):
        write_synced(tmp_path / "nowhere" / "manifest.json", "")


def test_no_other_code_renames_files_into_place() -> None:
    """One function is right for files, and one for folders; checkpoints are renamed to get them out of the way, too."""
    package = Path(atomic_files.__file__).parents[1]
    renaming = {
        name
        for name, text in sources("dsmoe", "benchmarks", "docker").items()
        if any(call in text for call in ("os.replace(", "os.rename(", ".rename(", ".replace(path)", ".replace(folder"))
    }
    assert renaming == {"dsmoe/runtime/atomic_files.py", "dsmoe/checkpoint/retention.py", "dsmoe/checkpoint/dcp.py"}
    dcp = (package / "checkpoint" / "dcp.py").read_text(encoding="utf-8")
    assert dcp.count(".rename(") == dcp.count("self.final.rename(hidden_name(self.final, ") == 1


def test_the_name_of_a_folder_is_forced_onto_the_disk_after_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda number: [done.append(f"sync {os.fstat(number).st_ino}"), fsync(number)])
    monkeypatch.setattr(os, "rename", lambda *names: [done.append("rename"), rename(*names)])
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial" / "file").write_text("x", encoding="utf-8")
    publish_folder(tmp_path / ".made.partial", tmp_path / "made")
    assert done == ["rename", f"sync {tmp_path.stat().st_ino}"]
    assert names(tmp_path) == ["made"]
    sync_file(tmp_path / "made" / "file")
    assert done[2:] == [f"sync {(tmp_path / 'made' / 'file').stat().st_ino}"]


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_takes_no_name_that_is_taken(is_file: bool, tmp_path: Path) -> None:
    final, partial = tmp_path / "made", tmp_path / ".made.partial"
    for folder in (partial, tmp_path if is_file else final):
        folder.mkdir(exist_ok=True)
    (final if is_file else final / "file").write_text("theirs", encoding="utf-8")
    with pytest.raises(OSError, match=r"made"):
        publish_folder(partial, final)
    assert partial.is_dir()
    assert (final if is_file else final / "file").read_text(encoding="utf-8") == "theirs"


def test_what_is_no_file_is_told_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "file").touch()
    for name in ("pipe", "link"):
        with pytest.raises(NotAFileError, match="is a pipe, not a file"):
            check_regular(tmp_path / name)
    with pytest.raises(NotAFileError, match="is a device, not a file"):
        check_regular(Path(os.devnull))
    with pytest.raises(IsADirectoryError):
        check_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "nothing")
    check_regular(tmp_path / "file")
