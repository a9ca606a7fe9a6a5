"""A small model to train on any layout, for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsmoe.config.schema import Config
from dsmoe.parallel import Groups
from dsmoe.parity.check_parity import TEXT
from dsmoe.parity.training import Training, train_few_steps
from dsmoe.plan.plan import Plan
from dsmoe.runtime.processes import Rank
from dsmoe.train import Trainer
from dsmoe.train.initialize import prepare_data
from dsmoe.train.trainer import make_trainer as assemble


def small_config(
    folder: Path, *, ranks: int = 1, expert: int = 1, zero_stage: int = 1, **sections: dict[str, Any]
) -> Config:
    """A two-layer model (one dense, one MoE) that runs in `folder`; `sections` update the tree."""
    shared = Path(os.environ["DSMOE_TESTS_CORPUS"])  # prepared once, not by every test
    corpus = shared / "corpus.txt"
    if not corpus.exists():
        corpus.write_text(TEXT, encoding="utf-8")
    tree: dict[str, Any] = {
        "name": "small",
        "runs_dir": str(folder / "runs"),
        "cluster": {"devices_per_node": ranks, "device": "cpu", "collective_timeout_seconds": 60},
        "parallel": {"expert": expert, "zero_stage": zero_stage},
        "model": {
            "vocab_size": 264,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "dense_layers": 1,
            "max_sequence_length": 32,
            "init_std": 0.08,
        },
        "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24, "balance": {"aux_loss": 0.02, "z_loss": 0.001}},
        "data": {"sources": ({"name": "sums", "path": str(corpus)},), "cache_dir": str(shared / "cache")},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "grad_clip": 0.5, "weight_decay": 0.1},
        "train": {
            "steps": 10,
            "batch_tokens": 8 * 32,
            "micro_batch_size": 1,
            "sequence_length": 32,
            "precision": "fp32",
            "eval_sequences": 4,
        },
        "observe": {"tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) and tree.get(name) else section
    return Config.model_validate(tree)


def train(config: Config, steps: int) -> Training:
    """Train on this rank of an already started world."""
    return train_few_steps(Plan.from_config(config), this_rank(), steps)


def this_rank() -> Rank:
    """Who this process is."""
    return Rank(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def make_trainer(config: Config) -> Trainer:
    """A trainer on this rank of an already started world."""
    plan, folder = Plan.from_config(config), Path(config.runs_dir) / "checkpoints"
    return assemble(plan, Groups(plan.topology), this_rank(), folder, prepare_data(config))
