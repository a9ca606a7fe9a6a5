"""Whatever stands in a checkpoint folder, and whatever its file system answers, saving goes on; nothing good goes."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import CheckpointException

from dsmoe.checkpoint import retention, safetensors, saving
from dsmoe.checkpoint.folder import all_checkpoints, look, verify
from dsmoe.checkpoint.manifest import Manifest, UnreadableError
from dsmoe.checkpoint.retention import remove_old, set_aside
from dsmoe.checkpoint.saving import SaveError
from dsmoe.cli import main
from dsmoe.config.schema import Checkpoint as CheckpointSection
from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import run_ranks
from tests.checkpoint.test_crashes import save_small
from tests.helpers.checkpoint_runs import folder_of, layout_config, logged_from_now
from tests.helpers.small_runs import make_trainer

OURS, OTHERS = ".step_00000003.partial", ".step_00000003.partial.swp"


def full_folder(path: Path) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "data").write_text("somebody's", encoding="utf-8")
    return path


def own_folder(path: Path) -> Path:
    """Make a folder as a killed save leaves it, on a system that writes files into folders."""
    path.mkdir()
    for name in ("manifest.json", "rank_00000_000.safetensors", "rank_100000_000.safetensors", ".DS_Store"):
        (path / name).write_text("ours", encoding="utf-8")
    return path


def link_to_elsewhere(path: Path) -> None:
    path.symlink_to(full_folder(path.parent.parent / "elsewhere"))


LEFT = {
    "a partial save": (OURS, own_folder, False),
    "another partial save": (".step_00000003.0123abcd.partial", own_folder, False),
    "what a removal has left": (".step_00000001.removed", own_folder, False),
    "a partial save with something in it": (OURS, full_folder, True),
    "a link that was a checkpoint's": (".step_00000001.removed", link_to_elsewhere, False),
    "a link to nothing": (OURS, lambda path: path.symlink_to("nowhere"), False),
    "a file of our name": (OURS, Path.touch, True),
    "an editor's file": (".step_00000003.swp", Path.touch, True),
    "an editor's file of a partial save": (OTHERS, Path.touch, True),
    "NFS' own": (".nfs00000000abcd0123", Path.touch, True),
    "somebody's folder": (".step_notes", full_folder, True),
    "somebody's copy": (".step_00000003.partial copy", full_folder, True),
    "somebody's copy of ours": (".step_00000003.partial.bak", own_folder, True),
    "a name that is no text": (os.fsdecode(b".step_\xff\n.partial"), full_folder, True),
    "a pipe": (".step_00000003.removed", os.mkfifo, True),
}


def save_two_more(folder: Path) -> list[str]:
    logged = logged_from_now()
    for step in (3, 4):
        save_small(folder, step)
    return logged


@pytest.mark.parametrize("kind", LEFT)
def test_nothing_in_the_folder_is_in_the_way(kind: str, tmp_path: Path) -> None:
    name, make, stays = LEFT[kind]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    make(folder / name)
    run_ranks(1, save_two_more, folder)
    assert [path.name for path in all_checkpoints(folder)] == ["step_00000003", "step_00000004"]
    for checkpoint in all_checkpoints(folder):
        verify(checkpoint)
    assert os.path.lexists(folder / name) == stays
    if (tmp_path / "elsewhere").exists():
        assert (tmp_path / "elsewhere" / "inner" / "data").exists(), "what a link points to is not ours"


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Any]:
    """Make folders that not even root can remove, and undo that afterwards."""
    made: list[Path] = []

    def make(path: Path) -> None:
        own_folder(path)
        made.append(path)
        if subprocess.run(["chattr", "-R", "+i", str(path)], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no immutable files")

    yield make
    for path in made:
        subprocess.run(["chattr", "-R", "-i", str(path)], check=False, capture_output=True)


@pytest.mark.parametrize("name", [OURS, ".step_00000001.removed", ".step_00000003.replaced"])
def test_what_cannot_be_removed_is_said_once_and_worked_around(name: str, immutable: Any, tmp_path: Path) -> None:
    immutable(tmp_path / name)
    (logged,) = run_ranks(1, save_two_more, tmp_path)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    (said,) = [line for line in logged if "cannot remove" in line]
    assert name in said
    assert "Operation not permitted" in said
    assert (tmp_path / name / "manifest.json").exists()


def test_a_checkpoint_that_cannot_be_moved_leaves_its_step_another_name(immutable: Any, tmp_path: Path) -> None:
    immutable(tmp_path / "step_00000003")
    (logged,) = run_ranks(1, save_two_more, tmp_path)
    assert any("saving step_000000003 beside it" in line for line in logged)
    assert [path.name for path in look(tmp_path).whole] == ["step_00000004", "step_000000003"]
    assert verify(tmp_path / "step_000000003").facts.step == 3


TAKEN: dict[str, Callable[[Path], object]] = {
    "a file": Path.touch,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link": link_to_elsewhere,
    "a folder": full_folder,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_somebody_has_put_where_a_checkpoint_goes_stays_there(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    taken = folder / "step_00000003"
    TAKEN[kind](taken)
    before = taken.lstat().st_ino
    (logged,) = run_ranks(1, save_two_more, folder)
    assert taken.lstat().st_ino == before
    assert any("saving step_000000003 beside it" in line and str(taken) in line for line in logged)
    assert verify(folder / "step_000000003").facts.step == 3
    assert not list(folder.glob(".step_*"))
    assert sorted(path.name for path in look(folder).whole) == ["step_000000003", "step_00000004"]


def save_where_nothing_is_removed(folder: Path, number: int) -> list[str]:
    """Save with an `unlink` and a `rmdir` that fail for everything hidden, as another user's or busy files do."""
    unlink, rmdir, logged = os.unlink, os.rmdir, logged_from_now()

    def refusing(operation: Any) -> Any:
        def refuse(path: Any, *arguments: Any, **options: Any) -> None:
            if "partial" not in str(path):
                raise OSError(number, os.strerror(number), str(path))
            operation(path, *arguments, **options)

        return refuse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", refusing(unlink))
        patch.setattr(os, "rmdir", refusing(rmdir))
        for step in range(1, 7):
            save_small(folder, step)
    return logged


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENOTEMPTY, errno.EROFS, errno.ESTALE])
def test_whatever_removal_answers_saving_goes_on(number: int, tmp_path: Path) -> None:
    (logged,) = run_ranks(1, save_where_nothing_is_removed, tmp_path, number)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]
    said = [line for line in logged if "cannot remove" in line]
    assert len(said) == len(set(said)) == 4, "each of steps 1 to 4, once"
    assert all(os.strerror(number) in line for line in said)


def save_where_nothing_is_renamed(folder: Path, number: int) -> list[str]:
    rename, logged = Path.rename, logged_from_now()

    def refuse(path: Path, target: Path) -> Path:
        if str(target).endswith("removed"):
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        for step in range(1, 6):
            save_small(folder, step)
    save_small(folder, 6)
    return logged


def test_old_checkpoints_that_cannot_be_renamed_go_when_they_can(tmp_path: Path) -> None:
    (logged,) = run_ranks(1, save_where_nothing_is_renamed, tmp_path, errno.EACCES)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]
    said = [line for line in logged if "is kept no more" in line]
    assert len(said) == len(set(said)) == 3


def test_a_linked_checkpoint_stays_with_what_it_points_to(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(1, save_two_more, folder)
    moved = (folder / "step_00000003").rename(tmp_path / "moved")
    (folder / "step_00000003").symlink_to(moved)
    remove_old(folder, CheckpointSection(keep=1))
    assert [path.name for path in all_checkpoints(folder)] == ["step_00000003", "step_00000004"]
    verify(folder / "step_00000003")


def save_four(folder: Path) -> None:
    for step in (1, 2, 3, 4):
        save_small(folder, step, keep=4)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("place", ["manifest", "files"])
def test_what_cannot_be_read_now_is_not_damaged_and_not_removed(
    number: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(1, save_four, tmp_path)
    method, of = ("read_text", "step_00000003/manifest.json") if place == "manifest" else ("stat", "000.safetensors")
    operation = getattr(Path, method)

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(of) and path.parent.name == "step_00000003":
            raise OSError(number, os.strerror(number), str(path))
        return operation(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing)
        found = look(tmp_path)
        assert list(found.unreadable) == [tmp_path / "step_00000003"]
        assert found.damaged == []
        assert found.unreadable[tmp_path / "step_00000003"].exit_code == (2 if number == errno.EACCES else 1)
        remove_old(tmp_path, CheckpointSection(keep=1))
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]


def test_contents_that_cannot_be_read_are_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(1, save_four, tmp_path)

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", failing)
        with pytest.raises(UnreadableError, match="Input/output error"):
            verify(tmp_path / "step_00000004")
    verify(tmp_path / "step_00000004")


def test_nothing_is_removed_while_the_newest_does_not_look_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(1, save_four, tmp_path)
    data = tmp_path / "step_00000004" / "rank_00000_000.safetensors"
    content = data.read_bytes()
    os.truncate(data, 10)  # what another node has written is seen late on NFS
    with caplog.at_level(logging.ERROR):
        assert remove_old(tmp_path, CheckpointSection(keep=1), tmp_path / "step_00000004") == []
    assert "was saved and does not look whole" in caplog.text
    data.write_bytes(content)
    remove_old(tmp_path, CheckpointSection(keep=1), tmp_path / "step_00000004")
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000004"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path))

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Stale file handle"):
        all_checkpoints(tmp_path)


OTHERS_IN = [
    *(".manifest.json.swp", "manifest.json~", ".nfs0123", ".DS_Store", "._manifest.json", "README.md", "notes"),
    *("rank_00000_000 (1).safetensors", "rank_00000_000.safetensors.orig", "manifest (copy).json"),
    *("model.pt", "rank_00000_001.safetensors", os.fsdecode(b"\xff\n")),
]
"""The last but one could be a file of ours, and is not of this checkpoint."""


def put(kind: str, path: Path) -> None:
    """Write something that the manifest does not list."""
    if kind == "notes":
        full_folder(path)
    elif kind == "model.pt":
        path.symlink_to("nowhere")
    else:
        path.write_text("somebody's", encoding="utf-8")


def test_what_the_manifest_does_not_list_does_not_damage_a_checkpoint_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, save_four, tmp_path)
    for kind in OTHERS_IN:
        checkpoint = Path(shutil.copytree(tmp_path / "step_00000004", tmp_path / "copies" / "step_00000004"))
        put(kind, checkpoint / kind)
        assert verify(checkpoint).facts.step == 4
        found = look(checkpoint.parent)
        assert list(found.whole) == [checkpoint]
        assert not found.passed_over
        assert main(["checkpoint", "verify", str(checkpoint)]) == 0
        assert capsys.readouterr().out.endswith(f"that the checkpoint does not list, not read: {kind!r}\n")
        assert main(["checkpoint", "show", str(checkpoint)]) == 0
        assert repr(kind) in capsys.readouterr().out
        shutil.rmtree(checkpoint.parent)
    assert main(["checkpoint", "show", str(tmp_path / "step_00000003")]) == 0
    assert "not read" not in capsys.readouterr().out


NOT_KEPT = (".DS_Store", "._manifest.json", "rank_00000_001.safetensors")
"""A system's own, and a name of ours."""


def save_over_others(folder: Path) -> list[str]:
    """Save several times, each removing an older checkpoint, with somebody's files in the first two."""
    logged = logged_from_now()
    for step in range(1, 7):
        save_small(folder, step)
        for kind in {1: OTHERS_IN, 2: NOT_KEPT}.get(step, ()):
            put(kind, folder / f"step_{step:08d}" / kind)
    return logged


def test_a_checkpoint_goes_and_what_others_have_in_it_stays(tmp_path: Path) -> None:
    (logged,) = run_ranks(1, save_over_others, tmp_path)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]
    (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left.name == ".step_00000001.removed"
    assert {path.name for path in left.iterdir()} == set(OTHERS_IN) - set(NOT_KEPT), "what was ours is gone"
    (said,) = [line for line in logged if "cannot remove" in line]
    assert f"cannot remove {left} (it has something that is not dsmoe's: '.manifest.json.swp', '.nfs0123'" in said


def save_with_losses(folder: Path, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        save_small(folder, step, keep=9)
        manifest = Manifest.read(folder / f"step_{step:08d}")
        text = replace(manifest, facts=replace(manifest.facts, validation_loss=loss)).text()
        (folder / f"step_{step:08d}" / "manifest.json").write_text(text, encoding="utf-8")


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    run_ranks(1, save_with_losses, tmp_path, [2.0, float("inf"), 3.0, 9.0])
    remove_old(tmp_path, CheckpointSection(keep=1, keep_best=2))
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000001", "step_00000003", "step_00000004"]


def test_an_earlier_one_that_was_set_aside_is_in_nobodys_way(immutable: Any, tmp_path: Path) -> None:
    full_folder(tmp_path / "step_00000001")
    full_folder(tmp_path / "step_00000002")
    own_folder(tmp_path / "step_00000001.damaged")
    immutable(tmp_path / "step_00000002.damaged")
    first, second = set_aside([tmp_path / "step_00000001", tmp_path / "step_00000002"])
    assert first == tmp_path / "step_00000001.damaged"
    assert second.name.startswith("step_00000002.")
    assert second.name.endswith(".damaged")
    assert not all_checkpoints(tmp_path)


def fail_and_recover(config: Config, failures: int, number: int, failing_rank: int) -> dict[str, Any]:
    """Fail `failures` times in the last save; return the log."""
    trainer, logged = make_trainer(config), logged_from_now()
    saving.PAUSES, saving.WORTH_SECONDS = (0.1, 0.2), (20.0, 20.0)
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    write, left = safetensors._write, [failures if trainer.rank.rank == failing_rank else 0]

    def failing(path: Path, *arguments: Any) -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return write(path, *arguments)

    safetensors._write = failing
    trainer.step()
    trainer.save()
    trainer.checkpoints.finish()
    return {"logged": logged, "left": left[0]}


@pytest.mark.parametrize(
    ("failures", "number", "failing_rank"), [(1, errno.ENOSPC, 0), (4, errno.EDQUOT, 1), (2, errno.EIO, 1)]
)
def test_the_last_save_is_tried_again_until_the_disk_has_it(
    failures: int, number: int, failing_rank: int, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, 2)
    results = run_ranks(2, fail_and_recover, config, failures, number, failing_rank)
    verify(folder_of(config) / "step_00000002")
    logged = results[0]["logged"]
    assert sum("the last save is tried again in" in line for line in logged) == failures
    assert sum(os.strerror(number) in line for line in logged) == failures
    loud = [line for line in logged if "NO NEW CHECKPOINT SINCE STEP 1 (20" in line]
    assert len(loud) == failures - 1
    assert all(f": {count} saves in a row have failed" in line for count, line in enumerate(loud, 2))


def give_up(config: Config, number: int, how: str) -> tuple[str, int, int]:
    trainer = make_trainer(config)
    saving.PAUSES, saving.STOPPING_SECONDS = (0.1, 0.1), 0.6
    saving.WORTH_SECONDS = (30.0, 30.0) if how != "the limit" else (0.6, 0.6)
    attempts = [0]

    def failing(*_: Any) -> None:
        attempts[0] += 1
        raise OSError(number, os.strerror(number))

    safetensors._write = failing
    trainer.step()
    trainer.save()
    told = threading.Event()
    if how == "a signal" and trainer.rank.rank == 1:
        threading.Timer(1.0, told.set).start()
    with pytest.raises(SaveError) as error:
        trainer.checkpoints.finish(told.is_set, is_stopping=how == "stopped before")
    return str(error.value), error.value.exit_code, attempts[0]


@pytest.mark.parametrize("how", ["the limit", "a signal", "stopped before"])
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_the_attempts_have_an_end_and_the_exit_code_says_whether_to_start_again(
    how: str, number: int, code: int, tmp_path: Path
) -> None:
    results = run_ranks(2, give_up, layout_config(tmp_path, 2), number, how)
    assert len({attempts for _, _, attempts in results}) == 1, "all ranks try as often"
    for message, exit_code, attempts in results:
        assert os.strerror(number) in message
        assert exit_code == code
        assert 2 <= attempts <= 30
    assert not list(folder_of(layout_config(tmp_path, 2)).glob(".step_*"))


@pytest.mark.parametrize(
    ("cause", "is_of_disk", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, 1),
        (OSError(errno.EACCES, "Permission denied", "rank_00001_000.safetensors"), True, 2),
        (RuntimeError("a bug"), False, 1),
    ],
)
def test_what_is_not_the_disks_fault_is_not_tried_again(
    cause: Exception, is_of_disk: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.dist, "get_world_size", lambda: 2)
    stack = traceback.StackSummary.from_list([])
    error = SaveError.from_exception(Path("step_00000003"), CheckpointException("save", {1: (cause, stack)}))
    assert (error.is_of_disk, error.exit_code) == (is_of_disk, code)
    assert "cannot save step_00000003: " in str(error)
    assert str(cause.args[1 if is_of_disk else 0]) in str(error)


def test_misses_are_counted_from_the_last_checkpoint_on() -> None:
    misses = saving.MissedSaves()
    misses.failed = 1
    assert misses.warning() == ""
    misses.put_off = 1
    assert "NO NEW CHECKPOINT SINCE THE BEGINNING (20" in misses.warning()
    assert "1 saves in a row have failed and 1 save in a row put off while steps were skipped" in misses.warning()
    misses.saved(7)
    assert misses.warning() == ""
    misses.put_off = 1
    assert misses.warning() == "", "what failed before is over"
    misses.put_off = 2
    assert "SINCE STEP 7 (20" in misses.warning()
    assert "): 2 saves in a row put off" in misses.warning()


def test_the_names_that_are_removed_are_those_that_are_written(tmp_path: Path) -> None:
    for suffix in ("partial", "replaced", "removed"):
        for step in ("step_00000001", "step_123456789"):
            path = retention.hidden_name(tmp_path / step, suffix)
            path.mkdir()
            other = retention.hidden_name(tmp_path / step, suffix)
            other.mkdir()
            assert path != other
    retention.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
    retention.remove_leftovers(tmp_path)
