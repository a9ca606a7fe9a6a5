"""Train a small model on a layout, for tests that compare layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsmoe.config.schema import Config
from dsmoe.moe.experts import StackedExperts
from dsmoe.parallel import Groups
from dsmoe.parallel.distributed import Rank
from dsmoe.parallel.tensor import Shard
from dsmoe.plan import Topology
from dsmoe.train import Trainer

TEXT = "".join(f"{n} times {n} is {n * n}; {n} plus {n} is {n + n}.\n" for n in range(400))


def small_config(
    folder: Path, *, ranks: int = 1, expert: int = 1, zero_stage: int = 1, **sections: dict[str, Any]
) -> Config:
    """A two-layer model (one dense, one MoE) on a text file in `folder`; `sections` update the tree."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus.write_text(TEXT)
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
        "data": {"sources": ({"name": "sums", "path": str(corpus)},), "cache_dir": str(folder / "cache")},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "grad_clip": 0.5, "weight_decay": 0.1},
        "train": {
            "steps": 10,
            "batch_tokens": 8 * 32,
            "micro_batch_size": 1,
            "sequence_length": 32,
            "precision": "fp32",
            "eval_batches": 4,
        },
        "observe": {"tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) and tree.get(name) else section
    return Config.model_validate(tree)


def make_trainer(config: Config) -> Trainer:
    """A trainer on this rank of an already started world."""
    rank = Rank(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return Trainer(config, Groups(Topology.from_config(config)), rank, Path(config.runs_dir) / "checkpoints")


def train(config: Config, steps: int) -> dict[str, Any]:
    """Train on this rank; the global losses and gradient norms of every step, this rank's weights, and what balances.

    Expert weights are split and named by global id, so that the union over the ranks is the whole model.
    """
    trainer = make_trainer(config)
    losses, norms = [], []
    for _ in range(steps):
        norm = float(trainer.step())
        losses.append(trainer.meter.read(layer_detail=False)["train/loss"])
        norms.append(norm)
    held_out = trainer.evaluate()["eval/loss"]
    weights, balance = named_weights(trainer), trainer.moe_layers[0].balance.state_dict()
    return {"losses": losses, "norms": norms, "held_out": held_out, "weights": weights, "balance": balance}


@dataclass(frozen=True)
class Part:
    """What one rank holds of a weight."""

    value: torch.Tensor
    shard: Shard | None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same part of the whole weight."""
        return whole if self.shard is None else self.shard.of(whole)


def named_weights(trainer: Trainer) -> dict[str, Part]:
    """This rank's weights; one entry per global expert."""
    weights = {}
    for name, parameter in trainer.model.named_parameters():
        value = parameter.detach().float().clone()
        module = trainer.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, StackedExperts):
            weights[name] = Part(value, getattr(module, "shard", None))
            continue
        start = trainer.groups.coordinate("expert") * module.num_local_experts
        gate_up, down = module.shards(trainer.groups.coordinate("expert_tensor"))
        shard = down if name.endswith("down") else gate_up
        weights.update({f"{name}[{start + local}]": Part(value[local], shard) for local in range(len(value))})
    return weights


def assemble(results: Sequence[dict[str, Part]]) -> dict[str, torch.Tensor]:
    """The whole model's weights from every rank's parts, all of which must be there."""
    wholes: dict[str, torch.Tensor] = {}
    for weights in results:
        for name, part in weights.items():
            if part.shard is None:
                wholes[name] = part.value
                continue
            empty = torch.full(part.shard.whole_shape(part.value.shape), float("nan"))
            part.shard.put(part.value, wholes.setdefault(name, empty))
    assert not any(whole.isnan().any() for whole in wholes.values())
    return wholes
