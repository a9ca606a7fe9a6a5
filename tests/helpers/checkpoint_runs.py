"""Short trainings that save and load, and what is in a checkpoint, for the tests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.manifest import Manifest
from dsmoe.checkpoint.safetensors import DTYPES, read_tensor
from dsmoe.config.schema import Config
from dsmoe.parallel.sharding import Box
from dsmoe.train import Trainer
from tests.helpers.small_runs import make_trainer, small_config

MODEL = {  # with everything that is cut, replicated, shared, or carried from step to step in its own way
    "model": {"qk_norm": True},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": 32,
        "shared_expert_ffn_size": 16,
        "router": {"score": "sigmoid"},
        "balance": {"aux_loss": 0.02, "z_loss": 0.001, "scope": "global", "bias_update_rate": 0.01},
    },
    # Adam divides a gradient by its own size: the rounding of one near zero would be a whole step of the weight.
    "optimizer": {"eps": 1e-6, "schedule": "cosine", "warmup_steps": 2},
}


def layout_config(
    folder: Path,
    ranks: int = 1,
    *,
    tensor: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    zero: int = 1,
    precision: str = "fp32",
    offload: bool = False,
    **sections: Any,
) -> Config:
    """`MODEL` on a layout; two sequences at a time, so that tensor ranks can share one."""
    parallel = {"tensor": tensor, "expert_tensor": expert_tensor, "sequence": tensor > 1}
    train = {"micro_batch_size": 2, "precision": precision, **sections.pop("train", {})}
    optimizer = {**MODEL["optimizer"], "offload": offload, **sections.pop("optimizer", {})}
    moved = {"parallel": parallel, "train": train, "optimizer": optimizer}
    tree = {**MODEL, **moved, **sections}
    return small_config(folder, ranks=ranks, expert=expert, zero_stage=zero, **tree)


def folder_of(config: Config) -> Path:
    return Path(config.runs_dir) / "checkpoints"


def logged_from_now() -> list[str]:
    """What dsmoe logs in this process, as it comes."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsmoe").addHandler(handler)
    return logged


def take_steps(trainer: Trainer, steps: int) -> dict[str, list[float]]:
    """The losses and gradient norms of some more steps."""
    losses, norms = [], []
    for _ in range(steps):
        norms.append(float(trainer.step()))
        losses.append(trainer.meter.read(layer_detail=False)["train/loss"])
    return {"losses": losses, "norms": norms}


def save_between(config: Config, before: int, after: int) -> dict[str, list[float]]:
    """Train, save, and train on while the checkpoint is being written; the figures of the later steps."""
    trainer = make_trainer(config)
    take_steps(trainer, before)
    trainer.save()
    figures = take_steps(trainer, after)
    trainer.checkpoints.flush()
    return figures


def go_on(config: Config, checkpoint: Path, steps: int) -> dict[str, list[float]]:
    """Load a checkpoint, save it again at once in the folder of `config`, and train on."""
    return go_on_with(make_trainer(config), checkpoint, steps)


def go_on_with(trainer: Trainer, checkpoint: Path, steps: int) -> dict[str, list[float]]:
    """The same with a trainer that is there."""
    trainer.resume(checkpoint)
    trainer.save()
    figures = take_steps(trainer, steps)
    trainer.checkpoints.flush()
    return figures


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint, put together from its boxes; nothing is left unset."""
    manifest = Manifest.read(checkpoint)
    found = {}
    for key, tensor in manifest.tensors.items():
        whole = torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])
        for chunk in tensor.chunks:
            values = read_tensor(checkpoint / chunk.file, tensor.dtype, chunk.shape, chunk.offset)
            Box(chunk.start, chunk.shape).view(whole).copy_(values)
        found[key] = whole
    return found
