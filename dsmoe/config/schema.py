"""Schema of the YAML file: all sections, and `Config` which holds them.

Every key is read by some code. Values that follow from others (data degree, accumulation steps, tokens per step) are
properties in `dsmoe.plan`, never keys.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dsmoe.config.sections.base import MathEffect, Name, NoEffect, Section, TensorEffect, Text
from dsmoe.config.sections.checkpoint import Checkpoint
from dsmoe.config.sections.cluster import Cluster, Device
from dsmoe.config.sections.data import Data, Source
from dsmoe.config.sections.model import Model
from dsmoe.config.sections.moe import Balance, Capacity, Experts, Moe, Router
from dsmoe.config.sections.observe import Observe
from dsmoe.config.sections.optimizer import Optimizer
from dsmoe.config.sections.parallel import Parallel
from dsmoe.config.sections.train import Train

__all__ = [
    "Balance",
    "Capacity",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Device",
    "Experts",
    "Model",
    "Moe",
    "Observe",
    "Optimizer",
    "Parallel",
    "Router",
    "Section",
    "Source",
    "Train",
]


class Config(Section):
    """One run: the root of the YAML file (`include` is resolved while loading and is not part of it)."""

    name: MathEffect[Name]
    """The run's name, and the name of its folder."""
    runs_dir: NoEffect[Text] = "runs"
    """The run folder is `runs_dir/name`."""
    cluster: Cluster = Cluster()
    """The machines."""
    parallel: Parallel = Parallel()
    """The layout over them."""
    model: Model
    """The transformer around the experts."""
    moe: TensorEffect[Moe | None] = None
    """The experts; null trains a dense model."""
    data: Data
    """The corpora and the tokenizer."""
    optimizer: Optimizer
    """AdamW and the learning-rate schedule."""
    train: Train
    """Length, batch and precision."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving and resuming."""
    observe: Observe = Observe()
    """Metrics."""
    deepspeed: NoEffect[dict[str, Any]] = Field(default={})
    """Merged into the generated DeepSpeed config; a key that dsmoe owns is refused."""
