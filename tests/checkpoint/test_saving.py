"""A checkpoint exists whole or not at all, training goes on while it is written, and old ones go when they may."""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.checkpoint import dcp, safetensors
from dsmoe.checkpoint.folder import candidates, verify
from dsmoe.checkpoint.manifest import Manifest
from dsmoe.checkpoint.saving import SaveError
from dsmoe.config import dump_config
from dsmoe.config.schema import Config
from dsmoe.metrics.sinks import JsonLines, TensorBoard
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.run import main
from dsmoe.train.trainer import Trainer, TrainingDivergedError
from tests.helpers.checkpoint_runs import (
    folder_of,
    layout_config,
    logged_from_now,
    save_between,
    take_steps,
    tensors_of,
)
from tests.helpers.small_runs import make_trainer


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_partial_checkpoint_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / ".step_00000007.partial").mkdir()
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / "step_notes").mkdir()
    found, passed_over = candidates(tmp_path)
    assert not found
    assert passed_over == [
        f"{tmp_path}/step_00000005 is not a whole checkpoint: {tmp_path}/step_00000005/manifest.json is missing"
    ]


def save_every_step(config: Config, steps: int, losses: list[float]) -> None:
    trainer = make_trainer(config)
    for step in range(steps):
        trainer.step()
        if step < len(losses):
            trainer._validation_loss, trainer._validated_step = losses[step], trainer.step_index
        trainer.save()
    trainer.checkpoints.flush()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2}, [6, 7]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 1, "keep_best": 2}, [2, 4, 7]),
        ({"keep": 2, "keep_every": 5, "keep_best": 1, "asynchronous": False}, [2, 5, 6, 7]),
    ],
)
def test_the_newest_the_milestones_and_the_best_are_kept(
    options: dict[str, Any], kept: list[int], tmp_path: Path
) -> None:
    config = layout_config(tmp_path, checkpoint=options)
    (tmp_path / "runs" / "small" / "checkpoints" / ".step_00000009.partial").mkdir(parents=True)
    run_ranks(1, save_every_step, config, 7, [5.0, 1.0, 4.0, 2.0, 3.0])
    assert steps_in(folder_of(config)) == [f"step_{step:08d}" for step in kept]
    for step in kept:
        verify(folder_of(config) / f"step_{step:08d}")


def save_with_slow_disk(config: Config) -> dict[str, Any]:
    trainer = make_trainer(config)
    may_write, write = threading.Event(), dcp.write_tensors

    def slow_write(*arguments: Any) -> Any:
        assert may_write.wait(30)
        return write(*arguments)

    dcp.write_tensors = slow_write
    trainer.step()
    weights = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.save()
    trainer.step()  # the disk has not moved
    nothing_yet = candidates(folder_of(config))[0]
    threading.Timer(1.0, may_write.set).start()
    begun = time.perf_counter()
    trainer.save()
    waited = time.perf_counter() - begun
    first_is_there = candidates(folder_of(config))[0]
    trainer.checkpoints.flush()
    return {"weights": weights, "nothing_yet": nothing_yet, "waited": waited, "first": first_is_there}


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    (result,) = run_ranks(1, save_with_slow_disk, config)
    assert result["nothing_yet"] == []
    assert result["waited"] > 0.8
    assert result["first"] == [folder_of(config) / "step_00000001"]
    saved = tensors_of(folder_of(config) / "step_00000001")
    for name, weight in result["weights"].items():
        assert torch.equal(saved[f"model/{name}"], weight), "the state of when it was saved"
    assert steps_in(folder_of(config)) == ["step_00000001", "step_00000002"]


def diverge_while_saving(config: Config) -> None:
    trainer = make_trainer(config)
    write = dcp.write_tensors

    def slow_write(*arguments: Any) -> Any:
        time.sleep(1.0)
        return write(*arguments)

    dcp.write_tensors = slow_write
    trainer.step()
    trainer.save()
    next(trainer.model.parameters()).data.fill_(math.nan)
    norm = trainer.step()
    with pytest.raises(TrainingDivergedError):
        trainer.log(norm)
    verify(folder_of(config) / "step_00000001")


def test_a_run_that_diverges_keeps_the_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    run_ranks(1, diverge_while_saving, layout_config(tmp_path))


def fail_while_saving(config: str) -> int:
    write = dcp.write_tensors

    def slow_write(*arguments: Any) -> Any:
        time.sleep(2.0)
        return write(*arguments)

    def step(trainer: Trainer) -> Any:
        if trainer.step_index == 2:
            raise ValueError("of the program's own")
        return take_step(trainer)

    dcp.write_tensors, take_step, Trainer.step = slow_write, Trainer.step, step  # type: ignore[method-assign]
    return main(["--config", config])


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    config = layout_config(tmp_path, train={"steps": 3}, checkpoint={"every": 2})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert run_ranks(1, fail_while_saving, str(path)) == [1]
    verify(tmp_path / "runs" / "small" / "checkpoints" / "step_00000002")


def fail_to_save(config: Config, failing_rank: int) -> list[str]:
    """Save, fail to save, fail again at the end."""
    trainer, logged = make_trainer(config), logged_from_now()
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    if trainer.rank.rank == failing_rank:

        def full(path: Path, *_: Any) -> None:
            path.write_bytes(b"some of it")
            raise OSError(28, "No space left on device")

        safetensors._write = full
    trainer.step()
    trainer.save()
    trainer.step()
    trainer.save()
    with pytest.raises(SaveError) as error:
        trainer.checkpoints.flush()
    return [*logged, str(error.value)]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_full_disk_is_said_and_training_goes_on_with_the_old_ones(failing_rank: int, tmp_path: Path) -> None:
    config = layout_config(tmp_path, 2)
    folder = folder_of(config)
    messages = run_ranks(2, fail_to_save, config, failing_rank)
    name = f"rank_{failing_rank:05d}_000.safetensors"
    for step, message in ((2, messages[0][-3]), (3, messages[0][-1]), (3, messages[1][-1])):
        where = f"{folder}/.step_{step:08d}.partial/{name}: No space left on device (rank {failing_rank})"
        assert message == f"cannot save {folder}/step_{step:08d}: {where}; the earlier checkpoints are there"
    assert steps_in(folder) == ["step_00000001"]
    verify(folder / "step_00000001")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False).returncode:
        pytest.skip("may not mount")
    try:
        config = layout_config(tmp_path, runs_dir=str(disk))
        (message,) = run_ranks(1, save_until_full, config)
        assert "No space left on device" in message
        whole, reasons = candidates(folder_of(config))
        assert whole
        assert not reasons
        verify(whole[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def save_until_full(config: Config) -> str:
    trainer = make_trainer(config)
    for _ in range(9):
        trainer.step()
        trainer.save()
        try:
            trainer.checkpoints.flush()
        except SaveError as error:
            _train_on_a_full_disk(trainer, folder_of(config).parent)
            return str(error)
    return "never full"


def _train_on_a_full_disk(trainer: Trainer, folder: Path) -> None:
    trainer.sinks = [JsonLines(folder / "metrics.jsonl", -1), TensorBoard(folder / "tensorboard", -1)]
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    logged = logged_from_now()
    for _ in range(3):
        trainer.log(trainer.step())
    assert {f"cannot write metrics of step {step}: No space left on device" for step in (3, 4, 5)} == set(logged)


def save_twice(config: Config) -> list[float]:
    """The same step, saved by another run that had passed the first one over."""
    trainer = make_trainer(config)
    take_steps(trainer, 1)
    trainer.save()
    trainer.checkpoints.flush()
    return [trainer.checkpoints.save(1, 256).stat().st_mtime_ns, trainer.checkpoints.save(1, 256).stat().st_mtime_ns]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced_and_a_good_one_is_left(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    final = folder_of(config) / "step_00000001"
    final.mkdir(parents=True)
    (final / "rank_00000_000.safetensors").write_text("damaged", encoding="utf-8")
    ((first, second),) = run_ranks(1, save_twice, config)
    assert first == second
    verify(final)
    assert steps_in(folder_of(config)) == [final.name]


LARGE = {
    "model": {"vocab_size": 2048, "hidden_size": 128, "ffn_size": 256},
    "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 256},
}


def save_one_step(config: Config) -> int:
    trainer = make_trainer(config)
    trainer.checkpoints.reserve()
    reserved = trainer.checkpoints._saver.buffer._bytes.data_ptr()
    trainer.step()
    trainer.save()
    trainer.checkpoints.flush()
    assert trainer.checkpoints._saver.buffer._bytes.data_ptr() == reserved, "enough memory from the beginning"
    return sum(parameter.numel() for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("ranks", "expert", "zero", "precision"), [(1, 1, 0, "fp32"), (2, 1, 0, "bf16"), (2, 2, 2, "bf16")]
)
def test_the_size_is_twelve_bytes_per_parameter_evenly_shared(
    ranks: int, expert: int, zero: int, precision: str, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, ranks, expert=expert, zero=zero, precision=precision, **LARGE)
    local = run_ranks(ranks, save_one_step, config)[0]
    manifest = Manifest.read(folder_of(config) / "step_00000001")
    count = manifest.bytes_of("model") // 4
    assert count >= local
    checkpoint = folder_of(config) / "step_00000001"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert 12 * count < sum(sizes.values()) < 12.24 * count
    ranks_sizes = [size for name, size in sizes.items() if name.startswith("rank_")]
    assert len(ranks_sizes) == ranks
    assert max(ranks_sizes) < 1.1 * min(ranks_sizes)


def save_in_small_files(config: Config) -> None:
    dcp.FILE_BYTES = 200_000
    save_between(config, 1, 0)


def test_large_ranks_write_several_files(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    run_ranks(1, save_in_small_files, config)
    checkpoint = folder_of(config) / "step_00000001"
    assert 2 <= len(verify(checkpoint).files) <= 5
    assert len(tensors_of(checkpoint)) > 10
