"""The files in `data/`, which dsmoe wrote before it was rebuilt, and how to use copies of them as a user does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsmoe import build_model
from dsmoe.config import Config, load_config
from tests.helpers.checkpoint_runs import tensors_of
from tests.helpers.forked import Outcome, start_on_ranks

DATA = Path(__file__).parents[1] / "compatibility" / "data"
RUNS = {"capacity": 1, "sigmoid": 2, "residual": 2, "dense": 2}
"""Runs that were interrupted after step 5, with their checkpoint of step 3 and metrics to the end; on so many ranks."""
FINISHED = "finished"
"""A run that is at its end, on one rank."""
HUGGING_FACE = {"mixtral": "capacity", "glm4_moe": "sigmoid", "qwen3_moe": FINISHED}
"""The architecture of each exported folder, and the run that it is of."""
VARIABLES = {"HOME": "/home/user", "SCRATCH": "/scratch", "CORPORA": "/corpora"}
"""What paths of the YAML files refer to."""
NUMBERS = (
    *("train/loss", "optim/grad_norm", "optim/lr", "moe/balance_loss", "moe/z_loss", "moe/dropped_percent"),
    *("eval/loss", "eval/bits_per_byte"),
)
"""Metrics that another machine computes alike."""


def yaml_files() -> list[str]:
    """Those that are given to commands; those in `parts` are included in them."""
    found = [path.relative_to(DATA / "yaml") for path in DATA.glob("yaml/**/*.yaml")]
    return sorted(str(path.with_suffix("")) for path in found if path.parent.name in ("", "shipped"))


def resolved(name: str, work: Path) -> dict[str, Any]:
    """The values that a YAML file in `work` comes to, by dotted key; what the variables stand for has to be set."""
    with inside(work):
        return dict(_flat("", load_config(f"yaml/{name}.yaml").model_dump(mode="json")))


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, below in value.items():
        yield from _flat(f"{key}.{name}" if key else name, below)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, to which relative paths are then relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def copy_for(work: Path, *runs: str) -> Path:
    """A folder as the user has it who started these runs: YAML files, their text, and the runs."""
    shutil.copytree(DATA / "yaml", work / "yaml")
    for run in runs:
        shutil.copytree(DATA / "run_folders" / run, work / "runs" / run)
    return work


def start(work: Path, ranks: int, config: str, *overrides: str) -> Outcome:
    """Train by a YAML file of `work`, on ranks of this machine."""
    outcome = start_on_ranks(ranks, work, "--config", config, *overrides)
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome


def said_of_run(out: str) -> str:
    """What a start prints from where its text is prepared to where it advises commands, which the machine decides."""
    return out[out.index("run ") : out.index("what to run next")]


def figures(run: Path) -> dict[int, dict[str, float]]:
    """The `NUMBERS` of each step in a run's folder."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        found.setdefault(line["step"], {}).update((name, line[name]) for name in NUMBERS if name in line)
    return found


@torch.no_grad()
def loss_of(config: Config, checkpoint: Path) -> float:
    """The loss of the model in a checkpoint, in fp32, on `fixed_tokens`."""
    model, tensors = build_model(config).eval(), tensors_of(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model/{name}"])
    for name, buffer in model.named_buffers():
        if f"buffer/{name}" in tensors:
            buffer.copy_(tensors[f"buffer/{name}"])
    return float(model(fixed_tokens(config.model.vocab_size)).mean())


def fixed_tokens(vocab_size: int) -> torch.Tensor:
    """Four sequences of 33 tokens, always the same."""
    return (torch.arange(4 * 33).square() * 7 % vocab_size).view(4, 33)
