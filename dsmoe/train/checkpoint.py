"""Save and resume a run on the same layout, exactly.

A checkpoint is a folder `step_00000100/` with one file per rank (its weights, fp32 masters, optimizer moments and
random states) and `checkpoint.json`. It is written under another name and renamed when every rank's file is on the
disk, so that it exists whole or not at all. Files hold tensors and numbers only; loading executes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.parallel.distributed import on_first_rank

logger = logging.getLogger(__name__)
MANIFEST = "checkpoint.json"


def save_checkpoint(folder: Path, step: int, engine: DeepSpeedEngine, config: Config) -> Path:
    """Write the state after `step` optimizer steps to `folder/step_XXXXXXXX`, and remove what is older than `keep`.

    Collective. Replaces a checkpoint of the same step.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    on_first_rank(lambda: _make_empty(partial))
    file = partial / _rank_file(dist.get_rank())
    with file.open("wb") as stream:
        torch.save(_state_of(engine), stream)
        stream.flush()
        os.fsync(stream.fileno())
    dist.barrier()
    on_first_rank(lambda: _finish(partial, final, step, config))
    return final


def load_checkpoint(checkpoint: Path, engine: DeepSpeedEngine, config: Config) -> int:
    """Put the checkpoint's state into `engine` and return its step.

    Raises:
        UserError: the checkpoint is incomplete or was written by another layout.
    """
    manifest = on_first_rank(lambda: _checked_manifest(checkpoint, config))
    state = torch.load(checkpoint / _rank_file(dist.get_rank()), map_location="cpu", weights_only=True)
    engine.module.load_state_dict(state["model"])
    _inner_optimizer(engine).load_state_dict(state["optimizer"])
    with torch.no_grad():
        for master, saved in zip(_masters(engine), state["masters"], strict=True):
            master.copy_(saved)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    step = int(manifest["step"])
    engine.global_steps = step
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = step - 1
    scheduler.step()
    return step


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    found = sorted(path for path in folder.glob("step_*") if (path / MANIFEST).is_file())
    return found[-1] if found else None


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, step: int, config: Config) -> None:
    files = {file.name: file.stat().st_size for file in sorted(partial.glob("rank_*.pt"))}
    manifest = {"step": step, "layout": _layout(config), "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in sorted(final.parent.glob("step_*"))[: -config.checkpoint.keep]:
        shutil.rmtree(old)


def _layout(config: Config) -> dict[str, Any]:
    """What must be the same for a checkpoint to be read."""
    return {
        "ranks": config.cluster.nodes * config.cluster.devices_per_node,
        **config.parallel.model_dump(),
        "precision": config.train.precision,
    }


def _checked_manifest(checkpoint: Path, config: Config) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a whole checkpoint: it has no {MANIFEST}")
    manifest: dict[str, Any] = json.loads(path.read_text())
    here = _layout(config)
    differing = [
        f"{key}: saved {saved}, now {here.get(key)}"
        for key, saved in manifest["layout"].items()
        if here.get(key) != saved
    ]
    if differing:
        raise UserError(
            f"{checkpoint} was saved by another layout ({'; '.join(differing)}); "
            f"this version resumes on the same layout only"
        )
    for name, size in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(
                f"{file} is missing or not of the {size} bytes that were written; the checkpoint is damaged"
            )
    return manifest


def _state_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    return {
        "model": engine.module.state_dict(),
        "optimizer": _inner_optimizer(engine).state_dict(),
        "masters": [master.detach() for master in _masters(engine)],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if engine.device.type == "cuda" else None,
    }


def _inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Torch's AdamW, which ZeRO and the mixed-precision wrapper keep as `.optimizer`."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """This rank's fp32 master weights where the optimizer has some apart from the model's, in a fixed order."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: this rank's flat shard of each group
        return list(optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "fp32_groups"):  # bf16 at stage 0
        return [master for group in optimizer.fp32_groups for master in group]
    return []
