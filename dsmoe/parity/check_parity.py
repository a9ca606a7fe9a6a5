"""`dsmoe parity`: does a config's model train the same on every layout? Trains a few steps on each and compares.

Alone it starts the ranks of each layout on this machine's CPU, and compares with one rank. Under a launcher it trains
every layout on the ranks that there are, and compares with the first.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dsmoe.config import Config, UserError, load_config
from dsmoe.exit_codes import DONE, FAILED
from dsmoe.parity.layouts import (
    ONE_RANK,
    Layout,
    all_of,
    as_overrides,
    changes,
    comparable,
    parse_layouts,
    shrunk,
)
from dsmoe.parity.training import TOLERANCES, Difference, Training, difference, train_few_steps
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import quantity, table
from dsmoe.runtime.failure_exit import exit_stalled, report_failure
from dsmoe.runtime.processes import join_processes, leave_processes, quiet_deepspeed
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.spawn import run_ranks
from dsmoe.runtime.watchdog import process_watchdog
from dsmoe.train.alike import run_fingerprint

LOCAL_SECONDS = 3600.0
"""After so long the local ranks of a layout are stopped."""

TEXT = "".join(f"{n} times {n} is {n * n}; {n} plus {n} is {n + n}.\n" for n in range(400))
"""The corpus of a shrunk model."""


@dataclass(frozen=True)
class Comparison:
    """A request: a config, the layouts to train it on, and how.

    Attributes:
        path: the config's file.
        overrides: settings of the user's over it.
        layouts: the first is what the others are compared with.
        steps: optimizer steps on each.
        precision: `fp32` or `bf16`.
        full: keep the config's own sizes and corpora.
    """

    path: str
    overrides: Sequence[str]
    layouts: Sequence[Layout]
    steps: int
    precision: str
    full: bool

    def config(self, layout: Layout, folder: Path) -> Config:
        """The run on `layout`; whatever it writes is in `folder`.

        Raises:
            UserError: the layout does not suit the model.
        """
        given = load_config(self.path, self.overrides)
        try:
            return load_config(self.path, [*self.overrides, *as_overrides(self._settings(given, layout, folder))])
        except UserError as error:
            raise UserError(f"layout '{layout.text}': {error}") from None

    def introduction(self) -> str:
        """Say what is trained, and what was changed for it."""
        given = load_config(self.path, self.overrides)
        size = "as it is" if self.full else "shrunk (--full trains it as it is)"
        line = f"{given.name}, {size}: {quantity(self.steps, 'step')} in {self.precision} on each layout"
        routing = {key: value for key, value in comparable(given, 1, self.precision).items() if key.startswith("moe.")}
        changed = changes(given, routing)
        return f"{line}\nwithout what depends on the layout: {', '.join(changed)}" if changed else line

    def _settings(self, given: Config, layout: Layout, folder: Path) -> dict[str, object]:
        text, cache = str(folder / "sums.txt"), str(folder / "cache")
        small = {} if self.full else {**shrunk(given, self.layouts, text), "data.cache_dir": cache}
        place = {"runs_dir": str(folder)}
        return {**comparable(given, self.steps, self.precision), **small, **layout.overrides, **place}


def check_parity(
    path: str, overrides: Sequence[str], layouts: Sequence[str], *, steps: int = 5, precision: str = "fp32", full: bool
) -> int:
    """Compare the layouts and print a table; the exit code: 0 where all train the same model.

    What ends it is explained once for all ranks, as where a run trains.
    """
    try:
        return DONE if _compare(path, overrides, layouts, steps, precision, full) else FAILED
    except Exception as error:
        return report_failure(error)


def _compare(
    path: str, overrides: Sequence[str], layouts: Sequence[str], steps: int, precision: str, full: bool
) -> bool:
    rendezvous = Rendezvous.from_environment()
    parsed = (
        parse_layouts(layouts, rendezvous.size) if rendezvous.is_launched else parse_layouts([ONE_RANK, *layouts], None)
    )
    comparison = Comparison(path, overrides, parsed, steps, precision, full)
    with tempfile.TemporaryDirectory(prefix="dsmoe-parity-") as folder:
        (Path(folder) / "sums.txt").write_text(TEXT, encoding="utf-8")
        plans = all_of(parsed, lambda layout: Plan.from_config(comparison.config(layout, Path(folder))))
        all_of(zip(parsed, plans, strict=True), lambda both: _refuse_what_depends_on_slices(both[1].config, both[0]))
        return (_under_launcher if rendezvous.is_launched else _on_this_machine)(comparison, plans)


def _on_this_machine(comparison: Comparison, plans: Sequence[Plan]) -> bool:
    print(comparison.introduction(), flush=True)
    rows, reference = [], None
    for layout, plan in zip(comparison.layouts, plans, strict=True):
        print(f"training on {layout.text} ({quantity(layout.ranks, 'rank')}) ...", file=sys.stderr, flush=True)
        trainings = run_ranks(layout.ranks, _train_on_cpu, plan, comparison.steps, timeout=LOCAL_SECONDS)
        reference = reference or trainings[0]
        rows.append((layout, difference(trainings, reference)))
    return _print_table(rows, reference, comparison)


def _train_on_cpu(plan: Plan, steps: int) -> Training:
    quiet_deepspeed()
    return train_few_steps(plan, join_processes("cpu"), steps)


def _under_launcher(comparison: Comparison, plans: Sequence[Plan]) -> bool:
    first = plans[0]
    # The configs of the layouts follow from the first: what else is asked for has to be the same as well.
    asked = {"--layouts": " ".join(layout.text for layout in comparison.layouts), "--steps": str(comparison.steps)}
    fingerprint, interface = {**run_fingerprint(first.config), **asked}, first.config.cluster.interface
    rank = join_processes(first.device_type, first.collective_timeout, interface, fingerprint)
    quiet_deepspeed()
    if not first.is_on_cpu:
        process_watchdog().watch_for_stalls(exit_stalled)
    if rank.is_first:
        print(comparison.introduction(), flush=True)
    rows, reference = [], None
    for layout, plan in zip(comparison.layouts, plans, strict=True):
        if rank.is_first:
            print(f"training on {layout.text} ...", file=sys.stderr, flush=True)
        training = train_few_steps(plan, rank, comparison.steps)
        trainings: list[Training | None] | None = [None] * rank.world_size if rank.is_first else None
        dist.gather_object(training, trainings)
        if trainings is not None:
            reference = reference or training
            rows.append((layout, difference([one for one in trainings if one is not None], reference)))
    same = [_print_table(rows, reference, comparison)] if reference is not None else [None]
    dist.broadcast_object_list(same, src=0)
    leave_processes()
    return bool(same[0])


def _print_table(rows: Sequence[tuple[Layout, Difference]], reference: Training | None, comparison: Comparison) -> bool:
    """The differences of each layout, and what they are differences from; whether all are within rounding."""
    assert reference is not None
    tolerance = TOLERANCES[comparison.precision]
    (first, _), *others = rows
    cells = [["layout", "ranks", "loss", "gradient norm", "held-out loss", "weights", "verdict"]]
    cells.append([first.text, str(first.ranks), *_from_to(reference), f"{reference.held_out:.4f}", "", "reference"])
    failed = 0
    for layout, off in others:
        wrong = off.beyond(tolerance)
        failed += bool(wrong)
        judged = math.isfinite(tolerance.weights)
        figures = [f"{value:.1e}" for value in (off.losses, off.norms, off.held_out)]
        figures.append(f"{off.weights:.1e}" if judged else "")
        verdict = "same" if not wrong else f"DIFFERENT: {', '.join(wrong)}"
        cells.append([layout.text, str(layout.ranks), *figures, verdict])
    print("\n".join(table(cells, "<>>>>><")))
    print(f"largest relative differences from {first.text}; weights in parts of {reference.travelled:.2g}, steps x lr")
    limits = f"the same is up to {tolerance.losses:.0e} (losses), {tolerance.norms:.0e} (norm)"
    weights = f", {tolerance.weights:.0e} (weights)" if math.isfinite(tolerance.weights) else "; weights are not judged"
    print(f"in {comparison.precision} {limits}{weights}")
    if first.ranks > 1:
        print("nothing was compared with one rank: what is wrong alike in all of these layouts does not show here")
    return failed == 0


def _from_to(reference: Training) -> list[str]:
    return [f"{values[0]:.4f} -> {values[-1]:.4f}" for values in (reference.losses, reference.norms)]


def _refuse_what_depends_on_slices(config: Config, layout: Layout) -> None:
    if config.moe is not None and config.moe.router.choice == "expert" and config.parallel.tensor > 1:
        raise UserError(
            f"layout '{layout.text}': with moe.router.choice: expert each tensor rank's experts choose among its own "
            f"tokens, so that tp={config.parallel.tensor} is another model than tp=1; compare layouts of tp=1"
        )
