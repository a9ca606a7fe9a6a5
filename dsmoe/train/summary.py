"""The end of a run in words: held-out losses beside a bigram model's, and the commands that go on from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.folder import candidates
from dsmoe.config.schema import Config
from dsmoe.launch.job import Request
from dsmoe.launch.programs import command_name
from dsmoe.launch.quoting import path_argument, shell_word
from dsmoe.metrics.definitions import EVAL_BITS_PER_BYTE, EVAL_HELD_OUT, EVAL_SOURCE_BITS_PER_BYTE
from dsmoe.plan.plan import Plan
from dsmoe.runtime.world import SRUN, launched_world
from dsmoe.train.changed import rate_when_longer
from dsmoe.train.run_folder import free_name

BITS_PER_BYTE, HELD_OUT = EVAL_BITS_PER_BYTE.name, EVAL_HELD_OUT.name


def summary(
    folder: Path, bigram: Mapping[str, float] | None, plan: Plan, held_out: Mapping[str, str] | None = None
) -> str:
    """The table of bits per byte at the start, at the end and of the bigram model, and commands to go on with.

    Evaluations of other text than the last one's are left out, and said: losses of two texts do not compare.

    Args:
        folder: the run folder; its `metrics.jsonl` has the evaluations. What is missing or damaged there is left out.
        bigram: the bigram model's metrics, under the same names; None where there are none.
        plan: the run.
        held_out: of which text the bigram model's are; None where that of the last evaluation is meant.
    """
    evaluations = list(_evaluations(folder / "metrics.jsonl"))
    table = _table(evaluations, bigram or {}, held_out) if evaluations else []
    return "\n".join([*table, *([""] if table else []), "what to run next", *_next_steps(folder, plan)])


def _table(
    evaluations: list[dict[str, Any]], bigram: Mapping[str, float], held_out: Mapping[str, str] | None
) -> list[str]:
    last = evaluations[-1]
    text = last.get(HELD_OUT)
    first = next(evaluation for evaluation in evaluations if evaluation.get(HELD_OUT) == text)
    others = [evaluation for evaluation in evaluations if evaluation.get(HELD_OUT) != text]
    ends = {f"step {evaluation['step']}": evaluation for evaluation in (first, last)}
    notes = [f"left out, as of other text: {_steps(others)} ({_differences(others[-1], text)})"] if others else []
    if held_out is not None and text != held_out:
        bigram = {}
        notes.append(f"no bigram model: it is of the text of this start, and step {last['step']} is not")
    columns = {**ends, "bigram model": bigram}
    sources = ((key, EVAL_SOURCE_BITS_PER_BYTE.variable_part(key)) for key in last)
    names = {key: source for key, source in sources if source is not None} | {BITS_PER_BYTE: "all"}
    width = max(len(name) for name in [*names.values(), "source"])
    table = [
        "held-out bits per byte (lower is better)",
        f"  {'source':<{width}}{''.join(f'  {column:>12}' for column in columns)}",
        *(f"  {names[k]:<{width}}{''.join(f'  {_number(c, k)}' for c in columns.values())}" for k in names),
        *notes,
    ]
    if BITS_PER_BYTE in bigram:
        gained = bigram[BITS_PER_BYTE] - last[BITS_PER_BYTE]
        verdict = f"{abs(gained):.2f} bits per byte {'better' if gained > 0 else 'worse'} than the bigram model"
        table.append(f"the model is {verdict} on text that neither has seen")
    return table


def _steps(evaluations: list[dict[str, Any]]) -> str:
    steps = [evaluation["step"] for evaluation in evaluations]
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} evaluations of steps {min(steps)} to {max(steps)}"


def _differences(evaluation: Mapping[str, Any], text: Any) -> str:
    """Name the sources whose text in an evaluation was not `text`."""
    old, new = (value if isinstance(value, dict) else {} for value in (evaluation.get(HELD_OUT), text))
    if not (old and new):
        return "not every one says of which"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name, 'nothing')} -> {new.get(name, 'nothing')}" for name in names)


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


def _next_steps(folder: Path, plan: Plan) -> list[str]:
    config, file, train = plan.config, folder / "config.yaml", plan.config.train
    longer = f"train.steps={2 * train.steps}" if train.steps else f"train.tokens={2 * (train.tokens or 0)}"
    program = Request(plan, str(file), (longer,)).program()
    accelerator = os.environ.get("DS_ACCELERATOR")  # without it DeepSpeed takes what it finds
    setting = f"DS_ACCELERATOR={shell_word(accelerator, 'DS_ACCELERATOR')} " if accelerator else ""
    onward = f"{setting}{command_name('deepspeed')} --num_gpus {config.cluster.devices_per_node} {program}"
    path = shell_word(path_argument(str(file)), "runs_dir")
    if config.cluster.nodes > 1:
        way = "--slurm" if launched_world().launcher == SRUN else "--hostfile"
        onward = f"{command_name('dsmoe')} launch {path} {longer} {way}"
    jump = rate_when_longer(plan, 2 * plan.batch.steps)
    events = shell_word(path_argument(str(folder / "tensorboard")), "runs_dir")
    commands = {
        f"{command_name('tensorboard')} --logdir {events}": "loss, load balance, dropped tokens, throughput",
        f"{command_name('dsmoe')} config show {path}": "every setting of this run",
        onward: f"train on from here: {jump}, and the start says what to write instead"
        if jump
        else "train on from here",
    }
    if not config.observe.tensorboard:
        del commands[next(iter(commands))]
    width = max(map(len, commands))
    return [f"  {command:<{width}}   # {what}" for command, what in commands.items()]


def after_divergence(config: Config, checkpoints: Path, begun_with: Path | None = None) -> str:
    """Advise how to go on when training has diverged: what to add to the command that has started the run.

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
