"""The model, batch and layouts that the benchmarks `train_step` and `checkpoint` train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe.config.schema import Config
from dsmoe.plan.text import quantity

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"vocab": 264, "hidden": 32, "layers": 2, "heads": 8, "experts": 4, "ffn": 32},
        **{"length": 32, "sequences": 2},
    },
    "cpu": {
        **{"vocab": 8192, "hidden": 512, "layers": 3, "heads": 8, "experts": 16, "ffn": 512},
        **{"length": 512, "sequences": 4},
    },
    # For an 80 GB card (84.9e9 bytes) with the five contenders of one rank. 487 M parameters: 134 M of embedding and
    # head, 4 layers of 12.6 M (attention) and 16 x 4.7 M (experts). Between steps each contender has 14 bytes of them
    # (bf16 weight, fp32 master and two moments): 5 x 6.8 = 34 GB. The one in a step also has
    # - DeepSpeed's two reduction buffers of 5e8 bf16 elements, 2 GB, and gradients with their copy, 2 GB;
    # - activations of 32,768 tokens, per token and layer 118 KiB with DeepSpeed's layer (padded rows; 0.19.8 has no
    #   [T, E, C] masks), 16 GB; with transformers 90 KiB, 12 GB, and three times its 4.3 GB of fp32 logits, 25 GB;
    # - when those are gone, 8 bytes for the optimizer (bf16 gradients twice, fp32 once), 4 GB.
    # 63 GB in all; the rest is for what the allocator cannot use between blocks.
    "gpu": {
        **{"vocab": 32768, "hidden": 2048, "layers": 4, "heads": 16, "experts": 16, "ffn": 768},
        **{"length": 2048, "sequences": 16},
    },
}
"""Of a model, and how many sequences of which length each rank has in a step; tiny is for the test."""


@dataclass(frozen=True)
class Run:
    """The measurements of one set of processes."""

    ranks: int
    dtype: str
    shape: str
    rounds: int
    device: str | None
    """As `cluster.device`: `cpu`, the name of a GPU whose peak is known, or None."""
    until: float | None = None
    """By `time.time()`, when no further round is begun; ranks do at least the two that it takes to have a figure."""
    sequences: int | None = None
    """Of each rank in a step, where they are not the shape's."""

    @property
    def name(self) -> str:
        """For people."""
        return f"dsmoe in {self.dtype}, {quantity(self.ranks, 'rank')}"

    @property
    def sequences_per_rank(self) -> int:
        """Sequences that each rank has in a step."""
        return self.sequences or int(SHAPES[self.shape]["sequences"])

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.ranks * self.sequences_per_rank * int(SHAPES[self.shape]["length"])

    def layouts(self) -> dict[str, dict[str, Any]]:
        """The `parallel` sections of dsmoe's rows."""
        if self.ranks == 1:
            return {"expert=1": {"expert": 1}}
        return {
            "expert=1": {"expert": 1},
            f"expert={self.ranks}": {"expert": self.ranks},
            f"expert={self.ranks} tensor=2": {"expert": self.ranks, "tensor": 2, "sequence": True},
        }


def sequences_that_fit(total_bytes: int) -> int:
    """Sequences of the shape `gpu` that fill a card of so many bytes: three quarters of it, as 16 do of an 80 GB card.

    By the arithmetic at `SHAPES`: 38 GB whatever the batch, and 25 GB of activations and logits for 16 sequences.
    """
    return max(1, int((0.75 * total_bytes / 1e9 - 38) / (25 / 16)))


def make_config(run: Run, parallel: dict[str, Any], capacity: float | None, folder: Path) -> Config:
    """A run of `run`'s shape; `folder` has the corpus that a `Trainer` wants to see."""
    shape = SHAPES[run.shape]
    tensor = parallel.get("tensor", 1)
    return Config.model_validate(
        {
            "name": "train_step",
            "cluster": {"devices_per_node": run.ranks, "device": run.device},
            "parallel": {**parallel, "zero_stage": 1},
            "model": {
                "vocab_size": shape["vocab"],
                "hidden_size": shape["hidden"],
                "num_layers": shape["layers"],
                "num_heads": shape["heads"],
                "num_kv_heads": shape["heads"] // 2,
                "head_dim": max(shape["hidden"] // shape["heads"], 16),
                "max_sequence_length": shape["length"],
                "norm_eps": 1e-6,
                "qk_norm": True,
                # So small that a token's experts depend on its own embedding: a fresh model of 0.02 sends 3 times the
                # mean to the fullest, because what attention adds is larger, and much the same for all tokens. The
                # test wants to see every weight in the loss.
                "init_std": 0.2 if run.shape == "tiny" else 0.002,
            },
            "moe": {
                "num_experts": shape["experts"],
                "top_k": 2,
                "expert_ffn_size": shape["ffn"],
                "balance": {"aux_loss": 0.01},
                # On a CPU nothing is gained by static shapes.
                "capacity": {"factor": capacity, "pad": run.device != "cpu"},
            },
            "data": {
                "sources": ({"name": "corpus", "path": str(folder / "corpus.txt")},),
                "cache_dir": str(folder / "cache"),
            },
            "optimizer": {"lr": 1e-5, "schedule": "constant"},  # so small that loads stay as they are
            "train": {
                "steps": run.rounds + 1,
                "batch_tokens": run.tokens,
                "micro_batch_size": run.sequences_per_rank * tensor,
                "sequence_length": shape["length"],
                "precision": run.dtype,
            },
        }
    )
