"""Kill a run of two ranks in each of its phases, start it again each time, and see that nothing is lost.

    python -m tests.helpers.crashes --kills 100 --seed 5

First `dsmoe prepare` or the run itself is killed while it tokenises; then the run while it starts, loads a checkpoint,
trains, saves, or removes an old one. All ranks get SIGKILL, or one, and the other goes on for a moment, or what has
started them, and what the ranks then do is looked at for a moment. Whatever has the name of a checkpoint or of a
prepared source must be one, byte for byte; the next start must go on from the newest; and in the end losses, gradient
norms, the cache and the whole state must be those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTINGS: list[dict[str, Any]] = [
    {"expert": 2, "zero": 1, "precision": "bf16", "checkpoint": {"asynchronous": True}},
    {"expert": 1, "zero": 2, "precision": "fp32", "checkpoint": {"asynchronous": False}},
    {"expert": 2, "zero": 2, "precision": "fp32", "checkpoint": {"asynchronous": True}},
    {"expert": 2, "tensor": 2, "zero": 0, "precision": "bf16", "checkpoint": {"asynchronous": False}},
]
"""Of one run after the other; each saves after every step."""
PHASES = {"preparing": 0.2, "starting": 0.1, "loading": 0.15, "training": 0.15, "saving": 0.25, "removing": 0.15}
"""What a run can be doing when it is killed, and how many of the kills are aimed there."""
WHO = {"all ranks": 0.45, "one rank": 0.45, "the launcher": 0.1}
"""Who is killed, and how often; `dsmoe prepare` besides."""


@dataclass
class Counts:
    """What has happened so far."""

    runs: int = 0
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and by who was killed."""
    starts: int = 0
    resumptions: int = 0
    """Starts that lived to say from which checkpoint they go on; it was the newest each time."""
    steps_lost: int = 0
    """Beyond the newest checkpoint that was there at the instant of a kill."""
    passed_over: int = 0
    """Checkpoints that a start found not to be whole."""
    prepared: int = 0
    """Times that a prepared source was compared with the undisturbed one's after a kill."""
    orphans: int = 0
    """Ranks whose launcher was killed."""
    outlived: Counter[str] = field(default_factory=Counter)
    """By phase, those of these that did not end by themselves within the time that they were given."""
    most_checkpoints: int = 0
    """That were there at once: old ones go when a save has come to its end."""
    most_leftovers: int = 0
    """Folders of unfinished saves and removals that were there at once."""
    most_partial: int = 0
    """The same of the cache."""

    def in_phase(self, phase: str) -> int:
        return sum(number for (where, _), number in self.kills.items() if where == phase)

    def table(self) -> str:
        """How many kills fell where, and what came of them."""
        who = [*WHO, "dsmoe prepare"]
        lines = [f"{'phase':10}{''.join(f'{name:>15}' for name in who)}{'kills':>8}"]
        for phase in PHASES:
            cells = "".join(f"{self.kills[phase, name]:>15}" for name in who)
            lines.append(f"{phase:10}{cells}{self.in_phase(phase):>8}")
        sums = "".join(f"{sum(self.kills[phase, name] for phase in PHASES):>15}" for name in who)
        lines.append(f"{'':10}{sums}{self.kills.total():>8}")
        others = {name: value for name, value in vars(self).items() if name != "kills"}
        others["outlived"] = dict(self.outlived)
        return "\n".join([*lines, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in others.items())])


def aims(number: int, instants: random.Random) -> list[str]:
    """Where the kills of a run are to fall: first those while it prepares, of the others each phase once at least."""
    preparing = min(number, max(1, round(PHASES["preparing"] * number)))
    others = [phase for phase in PHASES if phase != "preparing"]
    weights = [PHASES[phase] for phase in others]
    rest = [*instants.sample(others, len(others)), *instants.choices(others, weights, k=number)][: number - preparing]
    instants.shuffle(rest)
    return ["preparing"] * preparing + rest


def disturb_runs(
    folder: Path, kills: int, per_run: int, steps: int, seed: int, *, who: dict[str, float] = WHO
) -> Counts:
    """So many kills, over as many runs as it takes."""
    from tests.helpers.disturbed import Run

    counts, instants = Counts(), random.Random(seed)
    while counts.kills.total() < kills:
        here = folder / str(counts.runs)
        here.mkdir()
        run = Run(here, SETTINGS[counts.runs % len(SETTINGS)], steps, counts, who)
        run.disturb(aims(min(per_run, kills - counts.kills.total()), instants), instants)
        print(counts.table(), flush=True)
    return counts


def figures(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, of every line of training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["train/loss"], line["optim/grad_norm"]) for line in lines if "train/loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=25)
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    from tests.conftest import forget_settings  # not above: every rank imports this module

    forget_settings()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSMOE_TESTS_CORPUS"] = folder  # which pytest gives
        counts = disturb_runs(Path(folder), options.kills, options.per_run, options.steps, options.seed)
    print(f"{counts.kills.total()} kills, seed {options.seed}: every state and cache as undisturbed, bit for bit")


if __name__ == "__main__":
    main()
