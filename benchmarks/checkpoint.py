"""Saving and loading a training run's state: dsmoe's checkpoints beside DeepSpeed's own, by turns, in one process.

    python -m benchmarks.checkpoint --ranks 1 2 --rounds 7

Both contenders are the model of `benchmarks.train_step` in bf16 under ZeRO 1 with experts over all ranks, with the same
weights and Adam's moments: dsmoe's, and the same with DeepSpeed's MoE layers, saved by `engine.save_checkpoint` and
loaded by `engine.load_checkpoint`. Every round saves and loads with each of them once, in an order that rotates, from a
barrier to the end of the slowest rank. Ratios are medians over rounds of the ratio within a round. Writes
`benchmarks/results/checkpoint_cpu.json`.

* *Not equal*: dsmoe's files have checksums, which loading verifies; they, their names and their folders are forced onto
  the disk; 12 bytes per parameter. DeepSpeed's are pickles of 14 bytes per parameter, which `save_checkpoint` leaves to
  the system's cache: a power failure may cost them.
* *memory*: in `/dev/shm`, where forcing costs nothing: what the processes themselves take.
* *disk*: DeepSpeed's files are forced onto the disk as well, within the time, by all ranks together; what is loaded has
  been dropped from the system's cache.
* *stall*: how long `save` keeps an asynchronous run; the first one of a process, and a later one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring import seconds, write
from benchmarks.trainers import Contender, deepspeed_contender, dsmoe_contender
from benchmarks.workload import SHAPES, Run, make_config
from dsmoe.checkpoint.checkpointer import Checkpointer
from dsmoe.checkpoint.folder import checkpoint_name
from dsmoe.checkpoint.placement import sharded_tensors
from dsmoe.config.schema import Config
from dsmoe.plan.parameters import count_parameters
from dsmoe.runtime.atomic_files import sync_file
from dsmoe.runtime.processes import Rank, join_processes, leave_processes, quiet_deepspeed

MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shape", default="cpu", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7, help="after a first that is not counted")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a folder on a disk")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rounds, shape, folder = options.worker
        work(int(rounds), shape, Path(folder))
        return
    rows = [
        measure(ranks, storage, options.shape, options.rounds, parent)
        for ranks in options.ranks
        for storage, parent in (("memory", MEMORY), ("disk", options.disk))
    ]
    write("checkpoint_cpu", rows, "cpu", 1)
    print(table(rows))


def measure(ranks: int, storage: str, shape: str, rounds: int, parent: Path) -> dict[str, Any]:
    """Start the ranks, and make a row."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        command = [*launcher, "-m", "benchmarks.checkpoint", "--worker", str(rounds), shape, folder]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        measured = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    row = {"ranks": ranks, "storage": storage, **summarise(measured)}
    print(json.dumps(row), flush=True)
    return row


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, and medians of ratios within a round."""
    times: dict[str, list[float]] = measured["seconds"]

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    return {
        "parameters": measured["parameters"],
        "bytes_per_parameter": {n: measured["bytes"][n] / measured["parameters"] for n in ("dsmoe", "deepspeed")},
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "save_speed_over_deepspeed": ratio("deepspeed save", "dsmoe save"),
        "load_speed_over_deepspeed": ratio("deepspeed load", "dsmoe load"),
        "stall_over_save": {name: ratio(f"stall {name}", "dsmoe save") for name in ("first", "later")},
        "stall_over_deepspeed_save": ratio("stall later", "deepspeed save"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = (
        "ranks",
        "storage",
        "bytes per parameter",
        "save",
        "load",
        "stall",
        "first stall",
        "stall over DeepSpeed's save",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        stalls = (row["stall_over_save"]["later"], row["stall_over_save"]["first"], row["stall_over_deepspeed_save"])
        cells = [str(row["ranks"]), row["storage"], f"{row['bytes_per_parameter']['dsmoe']:.2f}"]
        cells += [f"{row[f'{action}_speed_over_deepspeed']:.2f}" for action in ("save", "load")]
        cells += [f"{100 * stall:.0f} %" for stall in stalls]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def work(rounds: int, shape: str, folder: Path) -> None:
    """One rank."""
    rank = join_processes("cpu")
    quiet_deepspeed()
    measured = take_turns(rank, rounds, shape, folder)
    if rank.is_first:
        (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    leave_processes()


def take_turns(rank: Rank, rounds: int, shape: str, folder: Path) -> dict[str, Any]:
    """Both contenders in turn, once per round: what `summarise` takes."""
    (folder / "corpus.txt").write_text("a checkpoint\n" * 64 * SHAPES[shape]["length"], encoding="utf-8")
    run = Run(rank.world_size, "bf16", shape, rounds, "cpu")
    config = make_config(run, {"expert": rank.world_size}, None, folder)
    ours, theirs = dsmoe_contender(config, rank, folder), deepspeed_contender(config, rank)
    turns = {"dsmoe": dsmoe_turn, "deepspeed": deepspeed_turn, "stall": stall_turn}
    size = (run.ranks * SHAPES[shape]["sequences"], SHAPES[shape]["length"] + 1)
    tokens = torch.randint(SHAPES[shape]["vocab"], size, generator=torch.Generator().manual_seed(0))
    for contender in (ours, theirs):
        contender.activate()
        contender.step(contender.part_of(tokens))  # from now on there are moments
    gc.freeze()  # so that looking for garbage between turns does not take longer than they do
    taken: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for number in range(rounds + 1):
        # What is there is removed after every turn: a disk may be slower where it has not been written before.
        for name in list(turns)[:: 1 if number % 2 else -1]:
            contender = theirs if name == "deepspeed" else ours
            contender.activate()
            for action, duration in turns[name](contender, config, folder / name):
                if number:
                    taken.setdefault(f"{name} {action}", []).append(duration)
            if rank.is_first:
                sizes[name] = size_of(folder / name / checkpoint_name(1))
                shutil.rmtree(folder / name)
            dist.barrier()
    return {"parameters": count_parameters(config).total, "bytes": sizes, "seconds": taken}


def dsmoe_turn(contender: Contender, config: Config, folder: Path) -> Iterator[tuple[str, float]]:
    """Save as a run does that waits for the disk, and load that."""
    saved = checkpoints(contender, config, folder, asynchronous=False)
    yield "save", slowest(lambda: saved.save(1, config.train.batch_tokens))
    forget_cached(folder)
    yield "load", slowest(lambda: saved.load(folder / checkpoint_name(1)))


def stall_turn(contender: Contender, config: Config, folder: Path) -> Iterator[tuple[str, float]]:
    """Save as a run does that trains on meanwhile; the second time the host memory has been written before."""
    saved = checkpoints(contender, config, folder, asynchronous=True)
    for step, name in ((1, "first"), (2, "later")):
        yield name, slowest(lambda step=step: saved.save(step, step * config.train.batch_tokens))
        saved.flush()


def checkpoints(contender: Contender, config: Config, folder: Path, asynchronous: bool) -> Checkpointer:
    """Those of a run that has just started."""
    section = config.checkpoint.model_copy(update={"asynchronous": asynchronous})
    engine, config = contender.engine, config.model_copy(update={"checkpoint": section})
    made = Checkpointer(folder, engine, sharded_tensors(engine.module), config)
    made.reserve()
    return made


def deepspeed_turn(contender: Contender, config: Config, folder: Path) -> Iterator[tuple[str, float]]:
    """Save, and load that."""
    engine, tag = contender.engine, checkpoint_name(1)

    def save() -> None:
        engine.save_checkpoint(str(folder), tag=tag)
        for path in my_files(folder):
            sync_file(path)

    yield "save", slowest(save)
    forget_cached(folder)
    yield "load", slowest(lambda: engine.load_checkpoint(str(folder), tag=tag))


def slowest(action: Callable[[], object]) -> float:
    """The seconds of the rank that takes longest."""
    gc.collect()
    dist.barrier()
    taken = torch.tensor(seconds(action, "cpu"), dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def my_files(folder: Path) -> list[Path]:
    """This rank's share of the files below a folder, when all ranks have written them."""
    dist.barrier()
    return sorted(path for path in folder.rglob("*") if path.is_file())[dist.get_rank() :: dist.get_world_size()]


def forget_cached(folder: Path) -> None:
    """Drop from the page cache what it keeps of files that are on the disk."""
    for path in my_files(folder):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    """Bytes in all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
