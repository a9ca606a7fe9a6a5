"""Does a router that starts collapsed recover? Each balancing method, and none, from the same skewed start.

A small byte-level model (two MoE layers, top-2 of 8) whose routers begin with a constant added to the logits of two
experts, so that nearly every token chooses those two. What each method does to the loads in 300 steps is written to
`benchmarks/results/router_collapse.json` and drawn in `docs/router_collapse.png` (needs matplotlib).

    python -m benchmarks.router_collapse            # a minute or two on one CPU core

The skew needs a direction that all tokens share, since a router has no bias: one coordinate of every embedding gets a
constant, and the rows of the favoured experts look at it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from dsmoe.config.schema import Config
from dsmoe.data import TrainLoader, prepare
from dsmoe.model import build_model
from dsmoe.model.transformer import Transformer
from dsmoe.moe import begin_step, read_statistics, update_routers

ROOT = Path(__file__).parents[1]
STEPS = 300
NUM_EXPERTS, TOP_K, FAVOURED = 8, 2, 2
SKEW = 4.0
"""What is added to the logits of the favoured experts: their softmax scores are then 0.43 each, the others' 0.02."""
RECOVERED = 2.0
"""Load of the fullest expert over the mean, in the mean of the last tenth; 4 is collapsed, 1 is perfect."""
METHODS: dict[str, dict[str, Any]] = {
    "none": {"aux_loss": 0.0},
    "loss, micro-batch": {"aux_loss": 0.05, "scope": "micro_batch"},
    "loss, sequence": {"aux_loss": 0.05, "scope": "sequence"},
    "loss, global": {"aux_loss": 0.05, "scope": "global"},
    "bias": {"aux_loss": 0.0, "bias_update_rate": 0.005},
}


def make_config(balance: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "router_collapse",
            "cluster": {"device": "cpu"},
            "model": {
                "vocab_size": 264,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 4,
                "max_sequence_length": 64,
            },
            "moe": {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "expert_ffn_size": 64, "balance": balance},
            "data": {"sources": [{"name": "code", "path": "builtin:python"}], "cache_dir": str(ROOT / ".cache/dsmoe")},
            "optimizer": {"lr": 5e-3},
            "train": {"steps": STEPS, "batch_tokens": 16 * 64, "micro_batch_size": 8, "sequence_length": 64},
        }
    )


def skew(model: Transformer) -> None:
    """Add about `SKEW` to the logits of the favoured experts, whatever the token."""
    with torch.no_grad():
        model.embedding.weight[:, 0] += 3 * model.embedding.weight.std()
        x_TD = model.blocks[0].ffn_norm(model.embedding.weight)
        for _, layer in model.moe_layers():
            layer.router.weight[:, 0] = 0.0
            layer.router.weight[:FAVOURED, 0] = SKEW / x_TD[:, 0].mean()


def train(balance: dict[str, Any], steps: int = STEPS) -> dict[str, list[float]]:
    """Train from the skewed start; for each step the loss and the worst layer's fullest expert over the mean load."""
    config = make_config(balance)
    loader = TrainLoader(prepare(config), config, 0, 1)
    model = build_model(config)
    skew(model)
    layers = [layer for _, layer in model.moe_layers()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas)
    micro_batches = config.train.batch_tokens // (config.train.micro_batch_size * config.train.sequence_length)
    for layer in layers:
        layer.loss_scale = 1 / micro_batches
    curves: dict[str, list[float]] = {"loss": [], "load_max_over_mean": []}
    for step in range(steps):
        begin_step(layers, step)
        losses = []
        for tokens in loader.micro_batches(step):
            losses.append(model(tokens).mean())
            (losses[-1] / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_routers(layers)
        loads = torch.stack([read_statistics(layer.statistics.sums, NUM_EXPERTS).assigned_E for layer in layers])
        curves["loss"].append(round(sum(loss.item() for loss in losses) / len(losses), 4))
        curves["load_max_over_mean"].append(round(float((loads.amax(1) / loads.mean(1)).max()), 4))
    return curves


def final_load(curves: dict[str, list[float]]) -> float:
    """The mean of `load_max_over_mean` over the last tenth of the steps."""
    loads = curves["load_max_over_mean"]
    last = loads[-max(len(loads) // 10, 1) :]
    return sum(last) / len(last)


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loads, losses) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, curves in results.items():
        loads.plot(curves["load_max_over_mean"], label=name, linewidth=1)
        smooth = torch.tensor(curves["loss"]).unfold(0, 15, 1).mean(1)
        losses.plot(range(14, len(curves["loss"])), smooth, label=name, linewidth=1)
    loads.axhline(1.0, color="grey", linewidth=0.5)
    loads.set(title="Load of the fullest expert over the mean", xlabel="step", ylim=(0.8, 4.2))
    losses.set(title="Cross entropy, nats per byte (mean of 15 steps)", xlabel="step")
    loads.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/router_collapse.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/router_collapse.png")
    options = parser.parse_args()
    results, begun = {}, time.perf_counter()
    for name, balance in METHODS.items():
        results[name] = train(balance, options.steps)
        loads, losses = results[name]["load_max_over_mean"], results[name]["loss"]
        said = "recovered" if final_load(results[name]) < RECOVERED else "did not recover"
        print(f"{name:18} max/mean {loads[0]:.2f} -> {final_load(results[name]):.2f}  loss {losses[-1]:.3f}  {said}")
    setting = {"steps": options.steps, "skew": SKEW, "num_experts": NUM_EXPERTS, "top_k": TOP_K, "methods": METHODS}
    options.json.write_text(json.dumps({"setting": setting, "curves": results}) + "\n", encoding="utf-8")
    plot(results, options.plot)
    print(f"{time.perf_counter() - begun:.0f} s; wrote {options.json} and {options.plot}")


if __name__ == "__main__":
    main()
