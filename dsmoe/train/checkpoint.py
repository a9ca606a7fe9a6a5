"""Save and resume a run on the same layout, exactly.

A checkpoint is a folder `step_00000100/` with one file per rank (its weights, fp32 masters, optimizer moments and
random states) and `checkpoint.json`, the manifest. It is written under another name and renamed when every rank's file
is on the disk, so that it exists whole or not at all. Files hold tensors and numbers only; loading executes nothing,
and nothing is loaded whose checksum is not the manifest's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.parallel.distributed import on_every_rank, on_first_rank
from dsmoe.train.engine import inner_optimizer, master_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST = "checkpoint.json"


def save_checkpoint(folder: Path, step: int, engine: DeepSpeedEngine, config: Config) -> Path:
    """Write the state after `step` optimizer steps to `folder/step_XXXXXXXX`, and remove what is older than `keep`.

    Collective. Replaces a checkpoint of the same step.

    Raises:
        UserError: some rank could not write (disk full, no permission); the earlier checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    on_first_rank(lambda: _make_empty(partial))
    file = partial / _rank_file(dist.get_rank())
    written = on_every_rank(lambda: _write(file, _state_of(engine)))
    manifest = {
        "step": step,
        "skipped_steps": engine.skipped_steps,
        "scheduler_step": engine.lr_scheduler.last_epoch,
        "layout": _layout(config),
        "model": _model(config),
        "files": {_rank_file(rank): facts for rank, facts in enumerate(written)},
    }
    on_first_rank(lambda: _finish(partial, final, manifest, config.checkpoint.keep))
    return final


def load_checkpoint(checkpoint: Path, engine: DeepSpeedEngine, config: Config) -> int:
    """Put the checkpoint's state into `engine` and return its step.

    Raises:
        UserError: the checkpoint is incomplete, damaged, of another model, or was written by another layout.
    """
    manifest = on_first_rank(lambda: read_manifest(checkpoint))
    _check_fits(checkpoint, manifest, config)
    name = _rank_file(dist.get_rank())
    on_every_rank(lambda: _check_file(checkpoint / name, manifest["files"].get(name)))
    state = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    engine.module.load_state_dict(state["model"])
    inner_optimizer(engine).load_state_dict(state["optimizer"])
    with torch.no_grad():
        for master, saved in zip(master_weights(engine), state["masters"], strict=True):
            master.copy_(saved)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    engine.global_steps = int(manifest["step"])
    engine.skipped_steps = int(manifest["skipped_steps"])
    # A skipped step does not advance the schedule: its place is not always the step's.
    engine.lr_scheduler.last_epoch = int(manifest["scheduler_step"]) - 1
    engine.lr_scheduler.step()
    return engine.global_steps


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    found = sorted(path for path in folder.glob("step_*") if (path / MANIFEST).is_file())
    return found[-1] if found else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What `checkpoint.json` says.

    Raises:
        UserError: it is missing or damaged.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a whole checkpoint: it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        missing = {"step", "skipped_steps", "scheduler_step", "layout", "model", "files"} - manifest.keys()
    except (ValueError, AttributeError):
        missing = {"everything"}
    if missing:
        raise UserError(f"{path} is damaged; remove {checkpoint} to resume from the one before it")
    return manifest


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None


def _write(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Save, force it onto the disk, and return the size and checksum of what should be there."""
    try:
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return {"bytes": file.stat().st_size, "sha256": _checksum(file)}
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when its stream stops short
        raise UserError(f"cannot save {file}: {error}; the earlier checkpoints are untouched") from None


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _finish(partial: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in sorted(final.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def _layout(config: Config) -> dict[str, Any]:
    """What must be the same for a checkpoint's files to be read."""
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    return {"ranks": ranks, **config.parallel.model_dump(), "precision": config.train.precision}


def _model(config: Config) -> dict[str, Any]:
    """What decides which tensors there are, and their shapes."""
    if config.moe is None:
        return config.model.model_dump()
    keys = {"num_experts", "expert_ffn_size", "shared_expert_ffn_size", "residual", "activation"}
    balance, capacity = config.moe.balance, config.moe.capacity
    kept_between_steps = {
        "moe.balance.scope is global": balance.scope == "global",
        "moe.balance.bias_update_rate is above 0": balance.bias_update_rate > 0,
        "moe.capacity.target_drop_percent is set": capacity.target_drop_percent is not None,
    }
    return {**config.model.model_dump(), **config.moe.model_dump(include=keys), **kept_between_steps}


def _check_fits(checkpoint: Path, manifest: dict[str, Any], config: Config) -> None:
    for what, here in (("layout", _layout(config)), ("model", _model(config))):
        saved = manifest[what]
        keys = {**saved, **here}
        differing = [f"{k}: saved {saved.get(k)}, now {here.get(k)}" for k in keys if saved.get(k) != here.get(k)]
        if differing:
            raise UserError(
                f"{checkpoint} is of another {what} ({'; '.join(differing)}); this version resumes the same model on "
                f"the same layout only"
            )


def _check_file(file: Path, facts: dict[str, Any] | None) -> None:
    if (
        facts is None
        or not file.is_file()
        or file.stat().st_size != facts["bytes"]
        or _checksum(file) != facts["sha256"]
    ):
        raise UserError(
            f"{file} is missing or not what was written; remove {file.parent} to resume from the one before it"
        )


def _state_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    return {
        "model": engine.module.state_dict(),
        "optimizer": inner_optimizer(engine).state_dict(),
        "masters": [master.detach() for master in master_weights(engine)],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if engine.device.type == "cuda" else None,
    }
