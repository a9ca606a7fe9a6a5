"""One run of the kill loop: kill it in a phase, see what is left, start it again, compare it in the end."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from dsmoe.checkpoint.folder import all_checkpoints, candidates, checkpoint_name, step_of, verify
from dsmoe.config import dump_config
from tests.helpers.checkpoint_runs import layout_config, tensors_of
from tests.helpers.crashes import Counts, figures
from tests.helpers.marked import LOADING
from tests.helpers.started import LAUNCHERS, Started, is_alive, start_prepare, start_ranks, wait_for

RANKS, KEEP = 2, 2
LARGE = {
    "model": {"vocab_size": 2048, "hidden_size": 128, "ffn_size": 256},
    "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 256, "balance": {"bias_update_rate": 0.01}},
}
"""20 MB of state, so that a save takes a while."""
SOURCES, DOCUMENTS = ("first", "second"), 40_000
"""Text whose preparation takes about a second."""
ORPHAN_SECONDS = 30.0
"""For which ranks whose launcher was killed are looked at, before they are killed as well."""
TRIES = 200
"""Instants at which to look for a phase that lasts for milliseconds."""
Change = tuple[str, int]
"""A path, and when something was last changed there."""


class Run:
    """One run, which is killed and started again.

    Args:
        folder: of its own.
        setting: one of `SETTINGS`.
        steps: how many it takes.
        counts: added to.
        who: who is killed how often.
    """

    def __init__(
        self, folder: Path, setting: dict[str, Any], steps: int, counts: Counts, who: dict[str, float]
    ) -> None:
        sources = tuple({"name": name, "path": str(_write_corpus(folder, name)), "format": "jsonl"} for name in SOURCES)
        options = {
            **LARGE,
            **setting,
            "train": {"steps": steps},
            "checkpoint": {**setting["checkpoint"], "every": 1, "keep": KEEP},
            "runs_dir": str(folder / "runs"),
            "data": {"sources": sources, "cache_dir": str(folder / "cache")},
        }
        config = layout_config(folder, RANKS, **options)
        self.folder, self.steps, self.counts, self.who = folder, steps, counts, who
        self.checkpoints, self.output = folder / "runs" / config.name / "checkpoints", folder / "output"
        self.cache, self.undisturbed_cache = folder / "cache", folder / "undisturbed_cache"
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        self.arguments = ["--config", str(folder / "config.yaml")]

    def disturb(self, aims: list[str], instants: random.Random) -> None:
        """Kill it in these phases, or in fewer if it comes to its end before; let it end, and compare."""
        other = ["name=undisturbed", "checkpoint.every=null", f"data.cache_dir={self.undisturbed_cache}"]
        self._end(start_ranks(self.output, [*self.arguments, *other]))
        aims = list(aims)
        while aims and self._kill_once(aims, instants):
            pass
        newest, started = self._check_folder(), start_ranks(self.output, self.arguments)
        self._end(started)
        self._check_start(started, newest)
        self._compare(self.folder / "runs" / "undisturbed")
        self.counts.runs += 1

    def _kill_once(self, aims: list[str], instants: random.Random) -> bool:
        """Start it, and kill it in the first phase that can come; False if the run has ended before."""
        newest = self._check_folder()
        aim = next((aim for aim in aims if newest or aim != "loading"), "starting")
        if aim in aims:
            aims.remove(aim)
        launcher = instants.choice(list(LAUNCHERS))
        (who,) = instants.choices(list(self.who), list(self.who.values()))
        if aim == "preparing" and self._is_prepared():
            shutil.rmtree(self.cache)  # else it would not be prepared again
        stale = self._leftovers() | self._partial()
        if aim == "preparing" and instants.random() < 0.5:
            who, started = "dsmoe prepare", start_prepare(self.output, self.arguments[1:])
        else:
            started = start_ranks(self.output, self.arguments, launcher if who == "the launcher" else None)
        if self._come_to(aim, started, stale, instants):
            self._kill(who, started, stale, instants)
            self._check_cache()
            self._check_start(started, newest)
            return True
        self._end(started)
        self._check_start(started, newest)
        if who == "dsmoe prepare":
            aims.append(aim)
        return who == "dsmoe prepare"

    def _come_to(self, aim: str, started: Started, stale: set[Change], instants: random.Random) -> bool:
        """Wait for the phase, and let the ranks stand still in it; False if the run has ended before."""
        steps = self._newest_step() + instants.randint(1 if aim == "removing" else 0, 3)
        # A preparation that is missed does not come again.
        passed = ("training", "saving") if aim in ("preparing", "loading") else ()
        for _ in range(TRIES):
            if aim == "starting":
                time.sleep(instants.uniform(0.0, 3.0))
            else:
                if aim in ("saving", "removing", "training"):
                    self._wait(started, lambda: self._newest_step() >= steps)
                self._wait(started, lambda: self._phase(started, stale) in (aim, *passed))
                time.sleep(instants.uniform(0.0, _WITHIN[aim]))
            if not started.is_running():
                return False
            started.stop()
            if aim in ("starting", self._phase(started, stale)) or self._phase(started, stale) in passed:
                return started.is_running()
            started.go_on()
        return started.is_running()

    def _wait(self, started: Started, condition: Any) -> None:
        """Until it is so, or the run has ended."""
        wait_for(lambda: condition() or not started.is_running(), started.said)

    def _phase(self, started: Started, stale: set[Change]) -> str:
        """What the run is doing, by its output and by the folders there."""
        if not self._partial() <= stale:
            return "preparing"
        said = started.said()
        is_begun = "\ncontinuing from " in said or "\nstep " in said
        new = {path for path, _ in self._leftovers() - stale}
        if any(path.endswith((".removed", ".replaced")) for path in new):
            return "removing"
        if any(path.endswith(".partial") for path in new):
            return "saving"
        if is_begun:
            return "training"
        return "loading" if LOADING in said else "starting"

    def _kill(self, who: str, started: Started, stale: set[Change], instants: random.Random) -> None:
        """Kill those who stand still now; where they are not all, let the others do for a time what harm they can."""
        phase, before = self._phase(started, stale), self._newest_step()
        self.counts.kills[phase, who] += 1
        if who == "the launcher":
            started.kill(started.launchers())
            started.go_on()
            self._look_at_orphans(started.ranks, phase)
        elif who == "one rank":
            victim = instants.choice(started.ranks)
            started.kill([victim])
            started.go_on()
            time.sleep(instants.uniform(0.0, 2.0))
        started.kill(started.ranks)
        started.join()
        wait_for(lambda: not any(map(is_alive, started.ranks)), started.said)
        self.counts.steps_lost += max(before - self._newest_step(), 0)

    def _look_at_orphans(self, ranks: list[psutil.Process], phase: str) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.counts.orphans += len(ranks)
        self.counts.outlived[phase] += sum(map(is_alive, ranks))

    def _end(self, started: Started) -> None:
        """Wait for the end of the run, which must be a good one."""
        codes = started.join()
        assert codes == [0] * len(codes), started.said()

    def _newest_step(self) -> int:
        return max(map(step_of, all_checkpoints(self.checkpoints)), default=0)

    def _leftovers(self) -> set[Change]:
        """What is being written or removed, or has been when the run was killed, as it is now."""
        return _changed(self.checkpoints, ".step_*")

    def _partial(self) -> set[Change]:
        """The same of the cache."""
        return _changed(self.cache, ".*.partial")

    def _is_prepared(self) -> bool:
        return len(list(self.cache.glob("[!.]*"))) == len(SOURCES)

    def _check_folder(self) -> Path | None:
        """Whether all that is called a checkpoint is one; the newest."""
        found, passed_over = candidates(self.checkpoints)
        assert not passed_over, passed_over
        for checkpoint in found:
            verify(checkpoint)
        self.counts.most_checkpoints = max(self.counts.most_checkpoints, len(found))
        self.counts.most_leftovers = max(self.counts.most_leftovers, len(self._leftovers()))
        return found[0] if found else None

    def _check_cache(self) -> None:
        """Whether each source is prepared as undisturbed, or not at all."""
        self.counts.most_partial = max(self.counts.most_partial, len(self._partial()))
        for folder in self.cache.glob("[!.]*"):
            self.counts.prepared += 1
            assert contents(folder) == contents(self.undisturbed_cache / folder.name)

    def _check_start(self, started: Started, newest: Path | None) -> None:
        """Whether the last start has gone on from there, if it has come so far."""
        said = started.said()
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
        assert [key for key, tensor in state.items() if not torch.equal(tensor, there[key])] == []
        kept = [checkpoint_name(step) for step in range(self.steps - KEEP + 1, self.steps + 1)]
        assert sorted(path.name for path in self.checkpoints.iterdir()) == kept, "nothing else is left"
        assert not self._partial(), "nor of the cache"
        assert contents(self.cache) == contents(self.undisturbed_cache)


_WITHIN = {"preparing": 0.5, "loading": 0.1, "training": 0.1, "saving": 0.08, "removing": 0.001}
"""Seconds, about as long as the phase lasts."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, but those that are hidden."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/[!.]*") if path.is_file()}


def _changed(folder: Path, pattern: str) -> set[Change]:
    found: set[Change] = set()
    with suppress(FileNotFoundError):  # of a folder that gets its name, or goes, while it is looked through
        for path in folder.glob(pattern):
            found.add((str(path), path.stat().st_ctime_ns))
    return found


def _write_corpus(folder: Path, name: str) -> Path:
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"{name}: {n} times {n} is {n * n}.\n"}) + "\n" for n in range(DOCUMENTS))
    return path
