"""Kill a run of two ranks at random instants, start it again each time, and see that nothing is lost.

    python -m tests.checkpoint.crashes --kills 100 --seed 5

Every start is `launch/pretrain.py` with the same command. One rank or both get SIGKILL: while a checkpoint is being
written, a moment after one, or before the first one of that start; where it was one, the other goes on for a moment.
Then whatever has a checkpoint's name must be one, byte for byte; the next start must go on from the newest; and in the
end losses, gradient norms and the whole state must be those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsmoe.checkpoint.folder import all_checkpoints, candidates, checkpoint_name, step_of, verify
from dsmoe.config import dump_config
from dsmoe.parallel.local import CONTEXT
from tests.checkpoint.runs import layout_config, tensors_of

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
RANKS, KEEP = 2, 2
Change = tuple[str, int]
"""A path, and when something was last changed there."""
SETTINGS: list[dict[str, Any]] = [
    {"expert": 2, "zero": 1, "precision": "bf16", "checkpoint": {"asynchronous": True}},
    {"expert": 1, "zero": 2, "precision": "fp32", "checkpoint": {"asynchronous": False}},
    {"expert": 2, "zero": 2, "precision": "fp32", "checkpoint": {"asynchronous": True}},
    {"expert": 2, "tensor": 2, "zero": 0, "precision": "bf16", "checkpoint": {"asynchronous": False}},
]
"""Of one run after the other; each saves after every step."""
LARGE = {
    "model": {"vocab_size": 2048, "hidden_size": 128, "ffn_size": 256},
    "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 256, "balance": {"bias_update_rate": 0.01}},
}
"""20 MB of state, so that a save takes a while."""
AIMS = {"save": 0.65, "step": 0.2, "start": 0.15}
"""Where kills fall, and how often."""
PATIENCE = 120.0
"""Seconds for anything."""


@dataclass
class Counts:
    """What has happened so far."""

    runs: int = 0
    kills: int = 0
    in_a_save: int = 0
    """Kills at whose instant a checkpoint was partly written, or an old one partly removed."""
    of_one_rank: int = 0
    """Kills of one rank, not of both."""
    starts: int = 0
    resumptions: int = 0
    """Starts that lived to say from which checkpoint they go on; it was the newest each time."""
    passed_over: int = 0
    """Checkpoints that a start found not to be whole."""
    most_checkpoints: int = 0
    """That were there at once: old ones go when a save has come to its end."""
    most_leftovers: int = 0
    """Folders of unfinished saves and removals that were there at once."""


class Run:
    """One run, which is killed and started again.

    Args:
        folder: of its own.
        setting: one of `SETTINGS`.
        steps: how many it takes.
        counts: added to.
    """

    def __init__(self, folder: Path, setting: dict[str, Any], steps: int, counts: Counts) -> None:
        saving = {**setting["checkpoint"], "every": 1, "keep": KEEP}
        options = {
            **LARGE,
            **setting,
            "train": {"steps": steps},
            "checkpoint": saving,
            "runs_dir": str(folder / "runs"),
        }
        config = layout_config(folder, RANKS, **options)
        self.folder, self.steps, self.counts = folder, steps, counts
        self.checkpoints, self.output = folder / "runs" / config.name / "checkpoints", folder / "output"
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    def disturb(self, kills: int, instants: random.Random) -> None:
        """Kill it so many times, or fewer if it comes to its end before; let it end, and compare."""
        self._end(self._start("name=undisturbed", "checkpoint.every=null"))
        for _ in range(kills):
            newest, stale = self._check_folder(), self._leftovers()
            ranks = self._start()
            if self._come_to_an_instant(ranks, stale, instants):
                self._kill(ranks, stale, instants)
            self._check_start(newest)
            if ranks[0].exitcode == 0:
                break
        newest, ranks = self._check_folder(), self._start()
        self._end(ranks)
        self._check_start(newest)
        self._compare(self.folder / "runs" / "undisturbed")
        self.counts.runs += 1

    def _start(self, *overrides: str) -> list[Any]:
        """Both ranks, as torchrun starts them: the store by which they meet is in this process."""
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.output.write_text("", encoding="utf-8")
        arguments = ["--config", str(self.folder / "config.yaml"), *overrides]
        ranks = [
            CONTEXT.Process(target=_rank_main, args=(rank, self._store.port, arguments, str(self.output)))
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        return ranks

    def _come_to_an_instant(self, ranks: list[Any], stale: set[Change], instants: random.Random) -> bool:
        """Wait until the next kill is due; False if the run has ended before."""
        (aim,) = instants.choices(list(AIMS), list(AIMS.values()))
        if aim == "start":
            time.sleep(instants.uniform(0.0, 4.0))
        else:
            saved = self._newest_step() + instants.randint(0 if aim == "save" else 1, 3)
            self._wait(ranks, lambda: self._newest_step() >= saved)
            files = self._changed("*/rank_*")
            self._wait(ranks, lambda: aim == "step" or not self._changed("*/rank_*") <= files)
            time.sleep(instants.uniform(0.0, 0.08 if aim == "save" else 0.3))
        if all(rank.exitcode is None for rank in ranks):
            return True
        self._end(ranks)
        return False

    def _wait(self, ranks: list[Any], condition: Callable[[], bool]) -> None:
        """Until it is so, or the run has ended."""
        deadline = time.monotonic() + PATIENCE
        while not condition() and all(rank.exitcode is None for rank in ranks):
            assert time.monotonic() < deadline, self.output.read_text(encoding="utf-8")
            time.sleep(0.0005)

    def _kill(self, ranks: list[Any], stale: set[Change], instants: random.Random) -> None:
        """Both at once, or one and, after a time in which it may do what harm it can, the other."""
        first, second = instants.sample(ranks, RANKS)
        alone = instants.choice((0.0, instants.uniform(0.0, 2.0)))
        self.counts.in_a_save += not self._leftovers() <= stale
        self.counts.of_one_rank += alone > 0.0
        self.counts.kills += 1
        os.kill(first.pid, signal.SIGKILL)
        time.sleep(alone)
        second.kill()
        for rank in (first, second):
            rank.join(PATIENCE)
        assert first.exitcode == -signal.SIGKILL, self.output.read_text(encoding="utf-8")

    def _end(self, ranks: list[Any]) -> None:
        """Wait for the end of the run, which must be a good one."""
        for rank in ranks:
            rank.join(PATIENCE)
        assert [rank.exitcode for rank in ranks] == [0] * RANKS, self.output.read_text(encoding="utf-8")

    def _newest_step(self) -> int:
        return max(map(step_of, all_checkpoints(self.checkpoints)), default=0)

    def _leftovers(self) -> set[Change]:
        """What is being written or removed, or has been when the run was killed, as it is now."""
        return self._changed(".*")

    def _changed(self, pattern: str) -> set[Change]:
        found: set[Change] = set()
        with suppress(FileNotFoundError):  # of a folder that gets its name, or goes, while it is looked through
            for path in self.checkpoints.glob(pattern):
                found.add((str(path), path.stat().st_ctime_ns))
        return found

    def _check_folder(self) -> Path | None:
        """Whether all that is called a checkpoint is one; the newest."""
        found, passed_over = candidates(self.checkpoints)
        assert not passed_over, passed_over
        for checkpoint in found:
            verify(checkpoint)
        self.counts.most_checkpoints = max(self.counts.most_checkpoints, len(found))
        self.counts.most_leftovers = max(self.counts.most_leftovers, len(self._leftovers()))
        return found[0] if found else None

    def _check_start(self, newest: Path | None) -> None:
        """Whether the last start has gone on from there, if it has come so far."""
        said = self.output.read_text(encoding="utf-8")
        resumed = re.findall("^continuing from (.*)$", said, re.MULTILINE)
        assert resumed in ([], [str(newest)]), f"not from {newest}:\n{said}"
        self.counts.starts += 1
        self.counts.resumptions += len(resumed)
        self.counts.passed_over += said.count("passed over: ")

    def _compare(self, undisturbed: Path) -> None:
        """Every figure and every bit with those of the run that nobody has disturbed."""
        run = self.checkpoints.parent
        assert figures(run) == figures(undisturbed)
        assert len(figures(run)) == self.steps
        last = checkpoint_name(self.steps)
        state, there = tensors_of(run / "checkpoints" / last), tensors_of(undisturbed / "checkpoints" / last)
        assert state.keys() == there.keys()
        assert all(torch.equal(tensor, there[key]) for key, tensor in state.items())
        kept = [checkpoint_name(step) for step in range(self.steps - KEEP + 1, self.steps + 1)]
        assert sorted(path.name for path in self.checkpoints.iterdir()) == kept, "nothing else is left"


def figures(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, of every line of training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["train/loss"], line["optim/grad_norm"]) for line in lines if "train/loss" in line]


def disturb_runs(folder: Path, kills: int, per_run: int, steps: int, seed: int) -> Counts:
    """So many kills, over as many runs as it takes."""
    counts, instants = Counts(), random.Random(seed)
    while counts.kills < kills:
        here = folder / str(counts.runs)
        here.mkdir()
        run = Run(here, SETTINGS[counts.runs % len(SETTINGS)], steps, counts)
        run.disturb(min(per_run, kills - counts.kills), instants)
        print(json.dumps(asdict(counts)), flush=True)
    return counts


def _rank_main(rank: int, port: int, arguments: list[str], output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    sys.argv = [str(PRETRAIN), *arguments]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=25)
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSMOE_TESTS_CORPUS"] = folder  # which pytest gives
        disturb_runs(Path(folder), options.kills, options.per_run, options.steps, options.seed)


if __name__ == "__main__":
    main()
