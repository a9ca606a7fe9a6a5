"""What a finished run says: what was learnt, against what a bigram model knows, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dsmoe.config.schema import Config
from dsmoe.launch.world import SRUN, launched_world
from dsmoe.plan.batch import Batch
from dsmoe.train.changed import rate_when_longer

BITS_PER_BYTE = "eval/bits_per_byte"


def summary(folder: Path, bigram: Mapping[str, float], config: Config) -> str:
    """The table of bits per byte at the start, at the end and of the bigram model, and commands to go on with.

    Args:
        folder: the run folder; its `metrics.jsonl` has the evaluations.
        bigram: the bigram model's metrics, under the same names.
        config: the run's.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if BITS_PER_BYTE in line]
    first, last = evaluations[0], evaluations[-1]
    keys = [key for key in last if key.endswith("/bits_per_byte")]
    names = {key: key.removeprefix("eval/").removesuffix("/bits_per_byte") for key in keys}
    names[BITS_PER_BYTE] = "all"
    width = max(len(name) for name in [*names.values(), "source"])
    start, end = f"step {first['step']}", f"step {last['step']}"
    table = [
        "held-out bits per byte (lower is better)",
        f"  {'source':<{width}}  {start:>12}  {end:>12}  {'bigram model':>12}",
        *(f"  {names[k]:<{width}}  {first[k]:>12.3f}  {last[k]:>12.3f}  {bigram[k]:>12.3f}" for k in keys),
    ]
    gained = bigram[BITS_PER_BYTE] - last[BITS_PER_BYTE]
    verdict = f"{abs(gained):.2f} bits per byte {'better' if gained > 0 else 'worse'} than the bigram model"
    table.append(f"the model is {verdict} on text that neither has seen")
    return "\n".join([*table, "", "what to run next", *_next_steps(folder, config)])


def _next_steps(folder: Path, config: Config) -> list[str]:
    file, train = folder / "config.yaml", config.train
    longer = f"train.steps={2 * train.steps}" if train.steps else f"train.tokens={2 * (train.tokens or 0)}"
    onward = f"deepspeed --num_gpus {config.cluster.devices_per_node} launch/pretrain.py --config {file} {longer}"
    if config.cluster.nodes > 1:
        way = "--slurm" if launched_world().launcher == SRUN else "--hostfile"
        onward = f"dsmoe launch {file} {longer} {way}"
    jump = rate_when_longer(config, 2 * Batch.from_config(config).steps)
    commands = {
        f"tensorboard --logdir {folder / 'tensorboard'}": "loss, load balance, dropped tokens, throughput",
        f"dsmoe config show {file}": "every setting of this run",
        onward: f"train on from here: {jump}, and the start says what to write instead"
        if jump
        else "train on from here",
    }
    width = max(map(len, commands))
    return [f"  {command:<{width}}   # {what}" for command, what in commands.items()]
