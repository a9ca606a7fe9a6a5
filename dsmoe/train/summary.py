"""What a run says at its end: what was learnt, against what a bigram model knows, and which commands go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.folder import candidates
from dsmoe.config.schema import Config
from dsmoe.launch.job import Request
from dsmoe.launch.world import SRUN, launched_world
from dsmoe.plan.batch import Batch
from dsmoe.train.changed import rate_when_longer
from dsmoe.train.folder import free_name

BITS_PER_BYTE = "eval/bits_per_byte"


def summary(folder: Path, bigram: Mapping[str, float] | None, config: Config) -> str:
    """The table of bits per byte at the start, at the end and of the bigram model, and commands to go on with.

    Args:
        folder: the run folder; its `metrics.jsonl` has the evaluations. What is missing or damaged there is left out.
        bigram: the bigram model's metrics, under the same names; None where there are none.
        config: the run's.
    """
    evaluations = list(_evaluations(folder / "metrics.jsonl"))
    table = _table(evaluations[0], evaluations[-1], bigram or {}) if evaluations else []
    return "\n".join([*table, *([""] if table else []), "what to run next", *_next_steps(folder, config)])


def _table(first: Mapping[str, Any], last: Mapping[str, Any], bigram: Mapping[str, float]) -> list[str]:
    keys = [key for key in last if key.endswith("/bits_per_byte")]
    names = {key: key.removeprefix("eval/").removesuffix("/bits_per_byte") for key in keys}
    names[BITS_PER_BYTE] = "all"
    width = max(len(name) for name in [*names.values(), "source"])
    start, end = f"step {first['step']}", f"step {last['step']}"
    table = [
        "held-out bits per byte (lower is better)",
        f"  {'source':<{width}}  {start:>12}  {end:>12}  {'bigram model':>12}",
        *(f"  {names[k]:<{width}}  {_number(first, k)}  {_number(last, k)}  {_number(bigram, k)}" for k in keys),
    ]
    if BITS_PER_BYTE in bigram:
        gained = bigram[BITS_PER_BYTE] - last[BITS_PER_BYTE]
        verdict = f"{abs(gained):.2f} bits per byte {'better' if gained > 0 else 'worse'} than the bigram model"
        table.append(f"the model is {verdict} on text that neither has seen")
    return table


def _evaluations(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that have one, of a file that anything may have happened to."""
    with suppress(OSError), path.open("rb") as lines:
        for line in lines:
            try:
                metrics = json.loads(line)
                if math.isfinite(metrics[BITS_PER_BYTE]) and isinstance(metrics["step"], int):
                    yield metrics
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue


def _number(metrics: Mapping[str, Any], key: str) -> str:
    value = metrics.get(key)
    return f"{value:>12.3f}" if isinstance(value, int | float) else f"{'-':>12}"


def _next_steps(folder: Path, config: Config) -> list[str]:
    file, train = folder / "config.yaml", config.train
    longer = f"train.steps={2 * train.steps}" if train.steps else f"train.tokens={2 * (train.tokens or 0)}"
    program = Request(config, str(file), (longer,)).program()
    onward = f"deepspeed --num_gpus {config.cluster.devices_per_node} {program}"
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
    if not config.observe.tensorboard:
        del commands[next(iter(commands))]
    width = max(map(len, commands))
    return [f"  {command:<{width}}   # {what}" for command, what in commands.items()]


def after_divergence(config: Config, checkpoints: Path, begun_with: Path | None = None) -> str:
    """How to go on when training has diverged: what to add to the command that has started the run.

    Args:
        config: the run's.
        checkpoints: the folder of its checkpoints, none of which has the diverged state.
        begun_with: the checkpoint from which this start has gone on.
    """
    options = config.optimizer
    rate = options.lr / 2
    slower = f"optimizer.lr={rate:g}" + (f" optimizer.min_lr={rate / 10:g}" if options.min_lr > rate else "")
    also = "optimizer.warmup_steps and optimizer.grad_clip may be changed as well"
    try:
        found, _ = candidates(checkpoints)
    except OSError:
        found = []
    if not found:
        begin = "There is no checkpoint yet. To begin anew"
        if begun_with is not None:
            begin = f"There is no checkpoint of this run yet. To begin with {begun_with} again"
        return f"{begin} with a lower rate, add to the same command: {slower} ({also})"
    again = " checkpoint.resume=auto" if config.checkpoint.resume == "never" else ""
    advice = (
        f"To go on from {found[0]}, the last good checkpoint, with a lower rate, add to the same command: "
        f"{slower}{again} ({also})"
    )
    if begun_with is not None and found[0].absolute() == begun_with.absolute():
        advice += ". This start began with it: should a lower rate end so too, the state in it is at fault"
    if len(found) > 1:
        earlier = f"name={free_name(config)} checkpoint.resume={found[-1]} {slower}"
        advice += f". From further back, in a folder of its own: {earlier}"
    return advice
