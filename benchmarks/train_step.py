"""Tokens per second of whole training steps: dsmoe, dsmoe's model with DeepSpeed's MoE layer, transformers' Qwen3-MoE.

    python -m benchmarks.train_step --ranks 1 2 4 --dtypes bf16 --rounds 5

A step is forward, backward, gradient reduction, clipping and AdamW. All contenders of a number of ranks live in the
same processes, each with its own engine; every round steps each of them once, in an order that rotates, from a barrier
to the end of the slowest rank. Ratios are medians over rounds of the ratio within a round. Writes
`benchmarks/results/train_step_DEVICE.json`; or, with `--rows`, each row to that file as soon as it is known.

With one rank, a contender that cannot be made or whose step fails is left out with a row that says why. With several
ranks a failure ends the run: those that are left would wait for each other.

Equal for all: the weights at the start; the global batch, the same in every round; layers, widths, heads, QK norm,
vocabulary, experts, top 2 by softmax with normalised weights, a balancing loss of coefficient 0.01; PyTorch's
`scaled_dot_product_attention`; the DeepSpeed configuration (ZeRO stage 1), parameter groups and torch's fused AdamW;
one process per rank. No data are read. Loads are nearly even, as in a model that has been trained with a balancing loss
(the fullest expert has 1.2 times the mean): who pads to the fullest expert pads little, and capacity 1.25 drops next to
nothing.

Not equal:

* dsmoe runs through its `Trainer`, which also counts routing statistics. Its router's weight is fp32 in a bf16 run;
  DeepSpeed's is bf16 multiplied in fp32, transformers' is bf16 multiplied in bf16.
* DeepSpeed's layer stands in dsmoe's model, with dsmoe's attention and loss. Its second expert is the second best, not
  a drawn one. It has the same expert parallel degree. `drop_tokens=False` is its dropless mode, which pads to the
  fullest expert. With a capacity of 1.25 it computes full buffers; dsmoe does so on CUDA, and on a CPU only what is
  kept.
* transformers has experts as `grouped_mm`, is dropless, and data-parallel only, at every layout. Its cross entropy
  takes whole fp32 logits; its balancing loss is one over all layers, dsmoe's and DeepSpeed's are one per layer.
* In rows with `tensor=2` only dsmoe is tensor-parallel (with sequence parallelism): half as many data ranks, each with
  twice the tokens. What a machine without a fast link pays for that is the point of the row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.gpu.supervise import STACKS_SECONDS, end_tree
from benchmarks.measuring import (
    DTYPES,
    GIB,
    TORCHRUN,
    Deadline,
    Rows,
    add_stage_options,
    first_line,
    free_memory,
    seconds,
    write,
)
from benchmarks.trainers import Contender, deepspeed_contender, dsmoe_contender, transformers_contender
from benchmarks.workload import SHAPES, Run, make_config, sequences_that_fit
from dsmoe.config.schema import Config
from dsmoe.exit_codes import FAILED
from dsmoe.plan.devices import known_device, resolve_device
from dsmoe.plan.flops import flops_per_token
from dsmoe.plan.parameters import count_parameters
from dsmoe.runtime.atomic_files import write_whole
from dsmoe.runtime.processes import Rank, join_processes, leave_processes, quiet_deepspeed

Result = TypeVar("Result")
NO_TIME = "no time left"
GRACE_SECONDS = 15.0
"""How long ranks may take to come to their end when their time is over."""
CAPACITIES = {"dropless": None, "capacity 1.25": 1.25}
MFU = {
    "mfu_percent": "MFU, attention counted in full (PaLM)",
    "mfu_causal_percent": "MFU, causal attention counted half (Megatron-LM)",
}
"""The share of the peak rate that dsmoe reaches, by its key in a row, with the convention of its FLOPs."""
OPPONENTS = {
    "deepspeed dropless": "dsmoe dropless",
    "deepspeed capacity 1.25": "dsmoe capacity 1.25",
    "transformers": "dsmoe dropless",
}
"""Who drops what is compared with whom."""


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--shape", default="gpu" if on_gpu else "cpu", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5, help="after a first that is not counted")
    parser.add_argument(
        "--device",
        default="cuda" if on_gpu else "cpu",
        help="a name of dsmoe.plan.devices, for MFU; cuda is what the device calls itself, without MFU where unknown",
    )
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    add_stage_options(parser)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Run(**options.worker))
        return
    device = known_device(torch.cuda.get_device_name()) if options.device == "cuda" else options.device
    sequences = None
    if options.shape == "gpu" and on_gpu and device != "cpu":
        sequences = sequences_that_fit(torch.cuda.get_device_properties(0).total_memory)
    rows, deadline = Rows(options.rows), Deadline(options.seconds)
    until = None if options.seconds is None else time.time() + options.seconds
    for dtype in options.dtypes:
        for ranks in options.ranks:
            run = Run(ranks, dtype, options.shape, options.rounds, device, until, sequences)
            if not (rows.rows and deadline.passed()):
                measure(run, options.threads, rows)
            elif rows.file is not None:
                rows.add({"kind": "checks", "check": run.name, "passed": None})
    if options.rows is None:
        kind = "cpu" if device == "cpu" else "cuda"
        write(f"train_step_{kind}", rows.rows, kind, options.threads)
    print(table(rows.rows))


def measure(run: Run, threads: int, rows: Rows) -> None:
    """Start the ranks, and make a row of every layout, and of every contender that was left out."""
    command = [*TORCHRUN, "--nproc-per-node", str(run.ranks), "-m", "benchmarks.train_step"]
    command += ["--worker", json.dumps(asdict(run))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpus.txt").write_text(
            "a training step\n" * 64 * SHAPES[run.shape]["length"], encoding="utf-8"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RESULTS": folder}
        code = _run_ranks(command, environment, run)
        measured = Path(folder) / "measured.json"
        if code and not measured.exists():
            sys.exit(code)  # the ranks have said why
        measured = json.loads(measured.read_text(encoding="utf-8"))
    crowded = run.device == "cpu" and run.ranks * threads > (os.cpu_count() or 1)
    setting = {"kind": "step", "ranks": run.ranks, "dtype": run.dtype}
    for name, error in measured["left_out"].items():
        rows.add({**setting, "contender": name, "error": error})
    figures = {layout: summarise(run, layout, measured["contenders"]) for layout in run.layouts()}
    for layout, found in figures.items():
        rows.add({**setting, "layout": layout, "more_ranks_than_cores": crowded, **found})
    for row in rows.rows[-len(run.layouts()) - len(measured["left_out"]) :]:
        print(json.dumps(row), flush=True)
    if rows.file is not None:
        rows.add({"kind": "checks", "check": run.name, **_verdict(measured["left_out"])})
    if code:
        sys.exit(code)


def _verdict(left_out: dict[str, str]) -> dict[str, Any]:
    """Return whether all of dsmoe's contenders were measured; None where there was no time for some."""
    ours = {name: why for name, why in left_out.items() if name.startswith("dsmoe")}
    failed = [f"{name}: {why}" for name, why in ours.items() if why != NO_TIME]
    if failed:
        return {"passed": False, "detail": failed[0]}
    return {"passed": None if ours else True}


def _run_ranks(command: list[str], environment: dict[str, str], run: Run) -> int:
    """Run them to their end, or end them when they are far over their time; returns the exit code."""
    ranks = subprocess.Popen(command, env=environment)
    try:
        return ranks.wait(None if run.until is None else max(run.until - time.time(), 0) + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the ranks are still running {GRACE_SECONDS:.0f} s after their time", file=sys.stderr, flush=True)
        end_tree(ranks, stacks_seconds=STACKS_SECONDS)
        return FAILED


def summarise(run: Run, layout: str, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One row: dsmoe at `layout`, and its peers with the same number of ranks and expert parallel degree."""
    expert = layout.split()[0]
    keys = {f"dsmoe {capacity}": f"dsmoe {layout} {capacity}" for capacity in CAPACITIES}
    keys |= {f"deepspeed {capacity}": f"deepspeed {expert} {capacity}" for capacity in CAPACITIES}
    keys["transformers"] = "transformers"
    figures = {name: measured[key] for name, key in keys.items() if key in measured}
    row: dict[str, Any] = {
        "tokens_per_second": {name: run.tokens / statistics.median(m["seconds"]) for name, m in figures.items()},
        "speed_over": {},
        "loss": {name: m["loss"] for name, m in figures.items()},
    }
    for peer, ours in OPPONENTS.items():
        if peer in figures and ours in figures:
            times = zip(figures[peer]["seconds"], figures[ours]["seconds"], strict=True)
            row["speed_over"][peer] = statistics.median(theirs / own for theirs, own in times)
    facts = resolve_device(run.device)
    if run.device != "cpu":
        row["peak_gib"] = {name: m["peak_bytes"] / GIB for name, m in figures.items()}
    if facts is not None and facts.peak_tflops is not None:
        config = make_config(run, {}, None, Path())
        flops = flops_per_token(config, count_parameters(config), SHAPES[run.shape]["length"])
        peak = facts.peak_tflops * 1e12 * run.ranks
        for key, work in (("mfu_percent", flops.training), ("mfu_causal_percent", flops.causal_training)):
            row[key] = {name: 100 * rate * work / peak for name, rate in row["tokens_per_second"].items()}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Speed of dsmoe over each opponent, and the share of the peak rate where that is known, as Markdown."""
    shares = {key: heading for key, heading in MFU.items() if any(key in row for row in rows)}
    headings = ["ranks", "layout", "dtype", *(f"over {opponent}" for opponent in OPPONENTS), "dsmoe, tokens/s"]
    headings += shares.values()
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for row in rows:
        if "layout" not in row:  # left out, or a check
            continue
        ratios = [f"{row['speed_over'][peer]:.2f}" if peer in row["speed_over"] else "" for peer in OPPONENTS]
        rates = row["tokens_per_second"]
        rate = f"{rates['dsmoe dropless']:.0f}" if "dsmoe dropless" in rates else ""
        reached = [row.get(key, {}).get("dsmoe dropless") for key in shares]
        percent = ["" if share is None else f"{share:.1f} %" for share in reached]
        cells = [str(row["ranks"]), row["layout"], row["dtype"], *ratios, rate, *percent]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def work(run: Run) -> None:
    """One rank: all contenders in turn, once per round."""
    rank = join_processes("cpu" if run.device == "cpu" else "cuda")
    quiet_deepspeed()
    folder = Path(os.environ["RESULTS"])
    entrants = Entrants(run, rank)
    make_contenders(entrants, folder)
    shape = SHAPES[run.shape]
    size = (run.ranks * run.sequences_per_rank, shape["length"] + 1)
    tokens = torch.randint(shape["vocab"], size, generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in entrants.contenders}
    for number in range(run.rounds + 1):
        if number > 1 and out_of_time(run, rank):
            break
        if not (names := list(entrants.contenders)):
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            of_step = entrants.attempt(name, partial(step_seconds, entrants, name, tokens))
            if number and of_step is not None:
                taken[name].append(of_step)
        if number:
            report(entrants, taken, None, folder)
    report(entrants, taken, tokens, folder)
    leave_processes()


def report(entrants: Entrants, taken: dict[str, list[float]], tokens: torch.Tensor | None, folder: Path) -> None:
    """Write what is known so far, for `measure`; with the loss of `tokens`, where they are given."""
    found = {}
    for name in list(entrants.contenders):
        figures = entrants.attempt(name, partial(figures_of, entrants, name, taken[name], tokens))
        if figures is not None:
            found[name] = figures
    if entrants.rank.is_first:
        write_whole(folder / "measured.json", json.dumps({"contenders": found, "left_out": entrants.left_out}))


def step_seconds(entrants: Entrants, name: str, tokens: torch.Tensor) -> float:
    """Measure the seconds of a step of this rank, from when all ranks are ready."""
    contender = entrants.contenders[name]
    contender.activate()
    gc.collect()
    dist.barrier()
    with contender.memory_counted():
        return seconds(partial(contender.step, contender.part_of(tokens)), entrants.rank.device.type)


def figures_of(entrants: Entrants, name: str, taken: list[float], tokens: torch.Tensor | None) -> dict[str, Any]:
    """Figures of a contender for `summarise`: the slowest rank's times, the largest memory, the loss of `tokens`."""
    contender, rank = entrants.contenders[name], entrants.rank
    contender.activate()
    worst = torch.tensor([*taken, contender.peak_bytes], dtype=torch.float64, device=rank.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    *slowest, peak_bytes = worst.tolist()
    figures = {"seconds": slowest, "peak_bytes": peak_bytes, "loss": None}
    if tokens is not None:
        with torch.no_grad():
            loss = contender.loss(contender.part_of(tokens)) / rank.world_size
        dist.all_reduce(loss)
        figures["loss"] = loss.item()
    return figures


def out_of_time(run: Run, rank: Rank) -> bool:
    """Return whether the time is over by any rank's clock; collective, so that all ranks stop after the same round."""
    over = run.until is not None and time.time() > run.until
    anywhere = torch.tensor(float(over), device=rank.device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)


class Entrants:
    """The contenders of a run, and why others are none."""

    def __init__(self, run: Run, rank: Rank) -> None:
        self.run, self.rank = run, rank
        self.contenders: dict[str, Contender] = {}
        self.left_out: dict[str, str] = {}

    def attempt(self, name: str, action: Callable[[], Result]) -> Result | None:
        """Return what `action` returns; None where it fails and the contender is out, with its memory free.

        With several ranks only a package that is missing, which it is on all of them, is no reason to fail.
        """
        try:
            return action()
        except Exception as error:  # whatever another library raises: the others go on
            if self.run.ranks > 1 and not isinstance(error, ImportError):
                raise
            self.left_out[name] = first_line(error)
        self.contenders.pop(name, None)
        free_memory()
        if self.rank.is_first:
            print(f"{name}: left out ({self.left_out[name]})", file=sys.stderr)
        return None

    def add(self, name: str, make: Callable[..., Contender], config: Config, *arguments: object) -> None:
        """Make a contender, by a name that `summarise` knows."""
        if self.contenders and out_of_time(self.run, self.rank):
            self.left_out[name] = NO_TIME
            return
        before = torch.cuda.memory_allocated()
        contender = self.attempt(name, partial(make, config, self.rank, *arguments))
        if contender is not None:
            self.contenders[name] = contender
            contender.kept_bytes = torch.cuda.memory_allocated() - before


def make_contenders(entrants: Entrants, folder: Path) -> None:
    """Every contender for this number of ranks; ours first."""
    run = entrants.run
    for layout, parallel in run.layouts().items():
        for capacity, factor in CAPACITIES.items():
            config = make_config(run, parallel, factor, folder)
            if "tensor" not in parallel or factor is None:  # one way is enough to see what it costs
                entrants.add(f"dsmoe {layout} {capacity}", dsmoe_contender, config, folder)
            if "tensor" not in parallel:
                entrants.add(f"deepspeed {layout} {capacity}", deepspeed_contender, config)
    entrants.add("transformers", transformers_contender, make_config(run, {}, None, folder))


if __name__ == "__main__":
    main()
