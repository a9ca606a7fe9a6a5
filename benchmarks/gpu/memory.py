"""Stage 4: where a training step's device memory goes, by component, for six configurations of one model.

    python -m benchmarks.gpu.memory --device cuda|cpu [--known-as NAME] [--tiny] [--rows FILE] [--seconds S]

One rank. Every row has the configuration's settings and sizes in GiB, so that a planner can be held against it.
`weights_gib`, `gradients_gib` and `optimizer_gib` are sizes of tensors. The others are what torch's allocator reports:
`activations_gib` is what the forward pass leaves allocated, `PART_peak_gib` the most during a part of the step,
`allocated_gib` what stays after it; all of these without what was allocated before the model was made.
`reserved_gib` is the most that the allocator held, and `outside_torch_gib` what others hold on the device: the context,
NCCL, other processes. On a CPU `allocated_gib` is what the process' resident size has grown by, and the rest is absent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.measuring import GIB, Deadline, Row, Rows, add_stage_options, first_line, free_memory
from dsmoe.config.schema import Config
from dsmoe.exit_codes import DONE
from dsmoe.parallel import Groups
from dsmoe.plan import Plan
from dsmoe.runtime.processes import Rank, join_processes, leave_processes, quiet_deepspeed
from dsmoe.train.initialize import prepare_data
from dsmoe.train.trainer import Trainer, make_trainer

BF16, FP32 = {"precision": "bf16"}, {"precision": "fp32"}
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "dropless, bf16, ZeRO 1": {"train": BF16},
    "capacity 1.25, bf16, ZeRO 2": {
        "train": BF16,
        "parallel": {"zero_stage": 2},
        "moe": {"capacity": {"factor": 1.25}},
    },
    "recompute experts, bf16, ZeRO 1": {"train": {**BF16, "recompute": "selective"}},
    "recompute blocks, bf16, ZeRO 1": {"train": {**BF16, "recompute": "full"}},
    "dense, bf16, ZeRO 1": {"train": BF16, "moe": {}},
    "dropless, fp32, ZeRO 0": {"train": FP32, "parallel": {"zero_stage": 0}},
}
"""What each changes; `moe: {}` is a model without experts, its feed-forward as wide as a token's experts together."""
SIZES = {
    "gpu": {
        "vocab": 32768,
        "hidden": 2048,
        "heads": 16,
        "layers": 4,
        "experts": 32,
        "ffn": 768,
        "length": 2048,
        "micro": 4,
    },
    "tiny": {"vocab": 264, "hidden": 64, "heads": 4, "layers": 2, "experts": 4, "ffn": 64, "length": 64, "micro": 2},
}
TOP_K = 4
STEPS = 3
"""The first makes buffers and optimizer state, the last is measured."""


def main() -> int:
    """Measure every configuration, one after the other in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--known-as", help="the device's name in dsmoe.plan.devices")
    parser.add_argument("--tiny", action="store_true")
    add_stage_options(parser)
    options = parser.parse_args()
    rows, deadline = Rows(options.rows), Deadline(options.seconds)
    rank = join_processes(options.device)
    quiet_deepspeed()
    device = "cpu" if options.device == "cpu" else options.known_as
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGURATIONS:
            row: Row = {"kind": "memory", "check": name, "passed": None}
            if deadline.passed():
                rows.add(row)
                continue
            try:
                row |= {"passed": True} | measured(
                    make_config(name, "tiny" if options.tiny else "gpu", device, Path(folder)), rank
                )
            except Exception as error:  # the next may fit, or work
                traceback.print_exc()
                row |= {"passed": False, "detail": f"{type(error).__name__}: {first_line(error)}"}
            free_memory()
            rows.add(row)
            print({key: value for key, value in row.items() if key != "settings"}, flush=True)
    leave_processes()
    return DONE


def make_config(name: str, size: str, device: str | None, folder: Path) -> Config:
    """A configuration by name."""
    changes, s = CONFIGURATIONS[name], SIZES[size]
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        texts = (f"{number} times {number} makes {number * number}, without a remainder" for number in range(4000))
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    is_dense = changes.get("moe") == {}
    moe = {"num_experts": s["experts"], "top_k": TOP_K, "expert_ffn_size": s["ffn"], "balance": {"aux_loss": 0.01}}
    moe |= {"capacity": {"factor": None}} | changes.get("moe", {})
    return Config.model_validate(
        {
            "name": "memory",
            "cluster": {"devices_per_node": 1, "device": device},
            "parallel": {"zero_stage": 1, **changes.get("parallel", {})},
            "model": {
                "vocab_size": s["vocab"],
                "hidden_size": s["hidden"],
                "num_layers": s["layers"],
                "num_heads": s["heads"],
                "num_kv_heads": s["heads"] // 4,
                "max_sequence_length": s["length"],
                **({"ffn_size": TOP_K * s["ffn"]} if is_dense else {}),
            },
            **({} if is_dense else {"moe": moe}),
            "data": {
                "sources": [{"name": "corpus", "path": str(corpus), "format": "jsonl"}],
                "cache_dir": str(folder / "cache"),
                "validation_fraction": 0.05,
            },
            "optimizer": {"lr": 1e-4, "schedule": "constant"},
            "train": {
                "steps": STEPS,
                "batch_tokens": s["micro"] * s["length"],
                "micro_batch_size": s["micro"],
                "sequence_length": s["length"],
                **changes["train"],
            },
            "checkpoint": {"every": None},
            "runs_dir": str(folder / "runs"),
        }
    )


def measured(config: Config, rank: Rank) -> Row:
    """Train a few steps and read, in the last one, what is there and what the peaks of its three parts are."""
    before = Reading.now(rank.device)
    plan, folder = Plan.from_config(config), Path(config.runs_dir) / "checkpoints"
    trainer = make_trainer(plan, Groups(plan.topology), rank, folder, prepare_data(config))
    for _ in range(STEPS - 1):
        trainer.step()
    parts = Parts(trainer, rank.device, before.allocated)
    trainer.step()
    after = Reading.now(rank.device)
    engine, model = trainer.engine, trainer.model
    weights = list(model.parameters())
    row: Row = {
        "parameters": sum(weight.numel() for weight in weights),
        "tokens": plan.batch.tokens_per_step,
        "weights_gib": size_of(weights),
        "optimizer_gib": size_of(optimizer_tensors(engine.optimizer), but=weights),
        "gradients_gib": parts.gradients_gib,
        "activations_gib": parts.activations_gib,
        **parts.peaks_gib,
        "allocated_gib": after.allocated - before.allocated,
        "left_by_others_gib": before.allocated,
        "reserved_gib": after.reserved,
        "outside_torch_gib": after.outside,
        "settings": json.loads(config.model_dump_json(exclude={"runs_dir", "data"})),
    }
    return {key: value for key, value in row.items() if value is not None}


class Reading:
    """Memory now by the allocator, in GiB; on a CPU the resident size of the process, and nothing else."""

    def __init__(self, allocated: float, reserved: float | None, outside: float | None) -> None:
        self.allocated, self.reserved, self.outside = allocated, reserved, outside

    @classmethod
    def now(cls, device: torch.device) -> Reading:
        """Read, with the device's queue empty. `outside` is taken on the device by anything but torch's allocator."""
        free_memory()
        if device.type == "cpu":
            return cls(psutil.Process().memory_info().rss / GIB, None, None)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_reserved(device)
        return cls(torch.cuda.memory_allocated(device) / GIB, peak / GIB, (total - free - reserved) / GIB)


class Parts:
    """Reads memory at the borders of a step's parts: forward, backward, optimizer step.

    `activations_gib` is what the forward pass leaves allocated for the backward pass. Peaks do not count what was
    allocated before there was a trainer.
    """

    def __init__(self, trainer: Trainer, device: torch.device, before_gib: float) -> None:
        self.peaks_gib: dict[str, float | None] = {}
        self.activations_gib: float | None = None
        self.gradients_gib = 0.0
        self._device, self._before_gib = device, before_gib
        self._begun = 0
        engine, model = trainer.engine, trainer.model
        backward, step = engine.backward, engine.step

        def measured_backward(loss: torch.Tensor) -> Any:
            self._begin()
            result = backward(loss)
            self._end("backward")
            self.gradients_gib = size_of(gradients(engine.optimizer, model))
            return result

        def measured_step() -> Any:
            self._begin()
            result = step()
            self._end("step")
            return result

        model.register_forward_pre_hook(lambda *_: self._begin())
        model.register_forward_hook(lambda *_: self._end("forward"))
        engine.backward, engine.step = measured_backward, measured_step

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._begun = torch.cuda.memory_allocated()

    def _end(self, part: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.peaks_gib[f"{part}_peak_gib"] = torch.cuda.max_memory_allocated() / GIB - self._before_gib
            if part == "forward":
                self.activations_gib = (torch.cuda.memory_allocated() - self._begun) / GIB


def size_of(tensors: Iterable[torch.Tensor], but: Iterable[torch.Tensor] = ()) -> float:
    """GiB of the storages behind the tensors, each once, without those behind `but`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in but}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in storages.items() if place not in left_out) / GIB


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Masters and moments of DeepSpeed's optimizer, or of torch's where there is no other."""
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    return states + [weight for group in inner.param_groups for weight in group["params"]]


def gradients(optimizer: Any, model: nn.Module) -> list[torch.Tensor]:
    """Gradients where they stand after a backward pass: on the weights, and in ZeRO's or the wrapper's own buffers."""
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for name in ("averaged_gradients", "fp32_groups_gradients", "grads_in_partition", "all_grad_tensors"):
        found += _tensors_in(getattr(optimizer, name, None))
    inner = getattr(optimizer, "optimizer", optimizer)
    found += [w.grad for group in inner.param_groups for w in group["params"] if w.grad is not None]
    return found


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    if torch.is_tensor(tree):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for part in tree for tensor in _tensors_in(part)] if isinstance(tree, (list, tuple)) else []


if __name__ == "__main__":
    sys.exit(main())
