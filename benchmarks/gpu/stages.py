"""The six stages in order of worth: what each is for, which program it is, and how much of the time it gets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

LAYER_PEERS = (
    *("dense floor", "dsmoe dropless", "dsmoe capacity 1.25", "transformers qwen3 grouped_mm", "liger grouped"),
    *("deepspeed no drop", "deepspeed capacity 1.25"),
)
START_SECONDS = {"cuda": 25.0, "cpu": 8.0}
"""Seconds of a stage that are left for importing torch and DeepSpeed, and for coming to an end."""


@dataclass(frozen=True)
class Machine:
    """The machine that the stages run on.

    Attributes:
        device: `cuda` or `cpu`.
        ranks: how many ranks train together at most: a power of two, as many as there are devices.
        known_as: the name of the device in `dsmoe.plan.devices`, which gives its peak rate; None where it has none.
        tiny: sizes that a CPU does in seconds: a rehearsal.
    """

    device: str
    ranks: int
    known_as: str | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage: `program` is a module of this repository; `seconds` are what it wants of nine minutes."""

    name: str
    program: str
    seconds: float

    def command(self, machine: Machine, rows: Path, allowed_seconds: float) -> list[str]:
        """Return the command to start; the program begins nothing new when its seconds are over."""
        left = max(allowed_seconds - START_SECONDS[machine.device], 1.0)
        common = ["--rows", str(rows), "--seconds", f"{left:.0f}"]
        return [sys.executable, "-m", self.program, *self._options(machine), *common]

    def _options(self, machine: Machine) -> list[str]:
        device, named = ["--device", machine.device], ["--known-as", machine.known_as] if machine.known_as else []
        own = [*device, *(["--tiny"] if machine.tiny else [])]
        ranks = ["--ranks", str(machine.ranks)]
        match self.name:
            case "right":
                return [*own, *ranks]
            case "layer":
                shapes = ["tiny"] if machine.tiny else ["qwen3_30b_a3b", "mixtral_8x7b"]
                tokens = [] if machine.tiny else ["--tokens", "32768", "8192"]
                measured = ["--shapes", *shapes, *tokens, "--dtypes", "bf16", "--routing", "balanced", "zipf"]
                return [*device, *measured, "--profile", "--peers", *LAYER_PEERS]
            case "step":
                worlds = [1] if machine.tiny else sorted({1, machine.ranks}, reverse=True)
                sizes = ["--shape", "tiny" if machine.tiny else "gpu", "--dtypes", "bf16"]
                return ["--device", machine.known_as or machine.device, *sizes, "--ranks", *map(str, worlds)]
            case "memory":
                return [*own, *named]
            case "preflight":
                return [*own, *ranks, *named]
        return own


STAGES = (
    Stage("right", "benchmarks.gpu.right", 150),
    Stage("layer", "benchmarks.moe_layer", 120),
    Stage("step", "benchmarks.train_step", 120),
    Stage("memory", "benchmarks.gpu.memory", 60),
    Stage("preflight", "benchmarks.gpu.limits", 45),
    Stage("tune", "benchmarks.gpu.tune", 45),
)


def time_limit(stage: Stage, later: list[Stage], left_seconds: float) -> float:
    """Return a stage's part of the time left: its fair share, or half of it all where the stage wants so much.

    What a stage leaves goes to those after it, and the last one has the rest.
    """
    fair = left_seconds * stage.seconds / sum(s.seconds for s in [stage, *later])
    return max(fair, min(stage.seconds, left_seconds / 2))
