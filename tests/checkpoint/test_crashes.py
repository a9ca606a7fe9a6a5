"""A run that is killed, or whose newest checkpoints are damaged, goes on as if nothing had been."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dsmoe.checkpoint.dcp import ChunkSavePlanner, FolderWriter, by_key
from dsmoe.checkpoint.folder import all_checkpoints, candidates, checkpoint_name, verify
from dsmoe.checkpoint.manifest import Facts, Manifest
from dsmoe.checkpoint.retention import remove_old
from dsmoe.checkpoint.state import Chunk
from dsmoe.config.schema import Checkpoint as CheckpointSection
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.crashes import disturb_runs, figures
from tests.train.test_run import pretrain, refused, write_config


def test_what_is_damaged_is_passed_over_and_said(tmp_path: Path) -> None:
    options = {"train": {"steps": 8}, "checkpoint": {"every": 2, "keep": 4}, "runs_dir": "runs"}
    config = str(write_config(tmp_path, **options))
    assert pretrain(tmp_path, "--config", config).code == 0
    run = tmp_path / "runs" / "small"
    undisturbed = figures(run)
    second, fourth, sixth, eighth = all_checkpoints(run / "checkpoints")
    (eighth / "manifest.json").unlink()
    damaged = sixth / "rank_00000_000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    again = pretrain(tmp_path, "--config", config)
    assert again.code == 0, again.err
    relative = Path("runs/small/checkpoints")
    assert f"passed over: {relative / eighth.name} is not a whole checkpoint" in again.out
    assert f"passed over: {relative / sixth.name / damaged.name} is damaged" in again.out
    assert f"continuing from {relative / fourth.name}" in again.out
    assert figures(run) == undisturbed
    for checkpoint in (second, fourth, sixth, eighth):
        verify(checkpoint)
        is_aside = checkpoint.with_name(f"{checkpoint.name}.damaged").exists()
        assert is_aside == (f"set aside: {relative / checkpoint.name}.damaged" in again.out) == (checkpoint > fourth)

    for checkpoint in (second, fourth, sixth, eighth):
        path = checkpoint / "rank_00000_000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(pretrain(tmp_path, "--config", config), "is damaged: it is not what was written")
    for checkpoint in (second, fourth, sixth, eighth):
        (checkpoint / "manifest.json").unlink()
    refused(pretrain(tmp_path, "--config", config), "Remove them to begin anew")


def save_three(folder: Path) -> None:
    for step in (1, 2, 3):
        save_small(folder, step, keep=3)


def test_only_whole_ones_count_as_kept_and_no_name_is_believed(tmp_path: Path) -> None:
    run_ranks(1, save_three, tmp_path)
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000099")
    assert [path.name for path in candidates(tmp_path)[0]] == ["step_00000001"]
    assert f"{tmp_path}/step_00000099 is not what its name says: it is of step 2" in candidates(tmp_path)[1]
    remove_old(tmp_path, CheckpointSection(keep=1))
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000001"]


def test_a_damaged_one_is_not_the_best(tmp_path: Path) -> None:
    run_ranks(1, save_three, tmp_path)  # the validation loss is the step
    (data,) = (tmp_path / "step_00000001").glob("*.safetensors")
    os.truncate(data, 10)
    remove_old(tmp_path, CheckpointSection(keep=1, keep_best=1))
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def save_texts(folder: Path, evaluated: list[tuple[str, float | None]]) -> None:
    """A checkpoint for each (text, loss)."""
    for step, (text, loss) in enumerate(evaluated, 1):
        save_small(folder, step, keep=99)
        manifest = Manifest.read(folder / f"step_{step:08d}")
        other = replace(manifest, facts=replace(manifest.facts, held_out=text, validation_loss=loss))
        (folder / f"step_{step:08d}" / "manifest.json").write_text(other.text(), encoding="utf-8")


TEXTS: list[tuple[str, float | None]] = [("a", 1.0), ("a", 3.0), ("b", 9.0), ("b", 7.0), ("b", 8.0), ("c", None)]


@pytest.mark.parametrize(
    ("keep_best", "kept"), [(0, [6]), (1, [1, 4, 6]), (2, [1, 2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])]
)
def test_the_best_of_each_text_stays_and_losses_of_two_texts_are_not_compared(
    keep_best: int, kept: list[int], tmp_path: Path
) -> None:
    run_ranks(1, save_texts, tmp_path, TEXTS)
    remove_old(tmp_path, CheckpointSection(keep=1, keep_best=keep_best))
    assert [path.name for path in all_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in kept]


def save_lengths(folder: Path) -> None:
    """Two checkpoints of each length of a sequence, the first the better one."""
    for step, length in enumerate((32, 32, 64, 64), 1):
        save_small(folder, step, keep=99)
        manifest = Manifest.read(folder / f"step_{step:08d}")
        config = {**manifest.facts.config, "train": {"sequence_length": length}}
        facts = replace(manifest.facts, held_out="a", validation_loss=float(step), config=config)
        text = replace(manifest, facts=facts).text()
        (folder / f"step_{step:08d}" / "manifest.json").write_text(text, encoding="utf-8")


def test_losses_of_sequences_of_two_lengths_are_not_compared(tmp_path: Path) -> None:
    run_ranks(1, save_lengths, tmp_path)
    remove_old(tmp_path, CheckpointSection(keep=1, keep_best=1))
    assert [path.name for path in all_checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (1, 3, 4)]


def test_killed_at_random_instants_a_run_of_two_ranks_goes_on_as_undisturbed(tmp_path: Path) -> None:
    """A short `python -m tests.helpers.crashes`."""
    who = {"all ranks": 1.0, "one rank": 1.0}  # a launcher takes longer: tests/train/test_run.py has one
    counts = disturb_runs(tmp_path, kills=6, per_run=6, steps=16, seed=3, who=who)
    assert (counts.kills.total(), counts.steps_lost, counts.passed_over) == (6, 0, 0)
    assert sum(counts.in_phase(phase) > 0 for phase in ("preparing", "loading", "saving", "removing")) >= 3, counts
    assert counts.resumptions >= 2, counts


class Killed(BaseException):
    """The process has been killed."""


class Mortal:
    """Let the operations of a save on the disk through, up to one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, lives: int) -> None:
        self.lives = lives
        for owner, name in ((Path, "mkdir"), (Path, "open"), (Path, "rename"), (os, "fsync"), (os, "unlink")):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            return operation(*arguments, **options)

        return watched


def save_small(folder: Path, step: int, keep: int = 2) -> None:
    """What `Checkpointer` does on the disk, with next to nothing to save."""
    chunks = [Chunk.whole("model/w", torch.full((3, 4), float(step))), Chunk.whole("step/w", torch.tensor(0.0))]
    facts = Facts(step, 0, 0, step, float(step), "AdamW", {"name": "small", "model": {}, "train": {}}, {}, {})
    writer = FolderWriter(folder / checkpoint_name(step), facts)
    dcp.save(by_key(chunks), storage_writer=writer, planner=ChunkSavePlanner())
    remove_old(folder, CheckpointSection(keep=keep))


def die_before_every_operation(folder: Path) -> list[int]:
    """Die before each operation of a save in turn, from the same two checkpoints; return the steps found afterwards."""
    newest, operations = [], 0
    while True:
        folder_of_save = folder / str(operations)
        for step in (1, 2):
            save_small(folder_of_save, step)
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(patch, operations)
            try:
                save_small(folder_of_save, 3)
                return newest
            except (Killed, CheckpointException):
                assert mortal.lives < 0
        found, passed_over = candidates(folder_of_save)
        assert not passed_over, "what has a checkpoint's name is one"
        newest.append(verify(found[0]).facts.step)
        save_small(folder_of_save, 3)
        left = sorted(path.name for path in folder_of_save.iterdir())
        assert left == ["step_00000002", "step_00000003"], (operations, left)
        operations += 1


def test_whatever_operation_is_the_last_one_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    (newest,) = run_ranks(1, die_before_every_operation, tmp_path)
    assert sorted(newest) == newest
    assert newest.count(2) >= 7, "two files, their folder, and their names"
    assert newest.count(3) >= 3, "the old one is removed afterwards"


def record_a_save(folder: Path) -> list[tuple[str, str]]:
    """Return what a save over an older one forces onto the disk, renames and removes, in order."""
    for step in (1, 2):
        save_small(folder, step)
    done: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, Path.rename, os.unlink

    def noted_fsync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        done.append(("rename", f"{path.name} {target.name}"))
        return rename(path, target)

    def noted_unlink(path: Any, **options: Any) -> None:
        done.append(("remove", str(path)))
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(Path, "rename", noted_rename)
        patch.setattr(os, "unlink", noted_unlink)
        save_small(folder, 3)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the names of open files")
def test_everything_is_on_the_disk_before_it_has_its_name_and_before_the_old_ones_go(tmp_path: Path) -> None:
    """When the power goes, what was not forced onto the disk is lost, in any order."""
    (done,) = run_ranks(1, record_a_save, tmp_path)
    assert done.pop(0) == ("sync", tmp_path.parent.name)
    assert done[:6] == [
        ("sync", "rank_00000_000.safetensors"),
        ("sync", "manifest.json"),
        ("sync", ".step_00000003.partial"),
        ("rename", ".step_00000003.partial step_00000003"),
        ("sync", tmp_path.name),
        ("rename", "step_00000001 .step_00000001.removed"),
    ]
    assert all(kind == "remove" for kind, _ in done[6:])
    assert len(done) == 8
