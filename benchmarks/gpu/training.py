"""Training of a small model through `launch/pretrain.py`: as on a CPU, through a kill, and the same on every layout.

Each function starts runs, waits for them, and returns rows with `passed`. A run that fails is a row that did not pass,
with the last line that it printed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.supervise import STACKS_SECONDS, end_tree, last_line
from benchmarks.measuring import TORCHRUN, Deadline, Row
from dsmoe.checkpoint.folder import all_checkpoints, step_of, verify
from dsmoe.checkpoint.safetensors import read_tensor
from dsmoe.parity.check_parity import TEXT
from dsmoe.plan.text import quantity

ROOT = Path(__file__).parents[2]
BEGUN = 2
"""Steps before the checkpoint from which every run starts."""
NO_TIME = "there was no time left"
PATIENCE = {"cuda": 75.0, "cpu": 400.0}
"""Seconds after which a run of the small model hangs; a CPU may be busy with other things."""
BOUNDS = {"fp32": 1e-3, "bf16": 5e-3}
"""How far a step's loss on a CUDA device may be from the CPU's, relatively, within these steps."""
MODEL: dict[str, Any] = {
    "name": "small",
    "model": {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 128,
        "dense_layers": 1,
        "max_sequence_length": 64,
        "qk_norm": True,
        "init_std": 0.08,
    },
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "expert_ffn_size": 64,
        "shared_expert_ffn_size": 32,
        "balance": {"aux_loss": 0.02, "z_loss": 0.001, "scope": "global", "bias_update_rate": 0.001},
        "capacity": {"factor": None, "eval_factor": None},
    },
    # Adam divides a gradient by its own size: the rounding of one near zero would be a whole step of the weight.
    "optimizer": {"lr": 1e-3, "eps": 1e-6, "schedule": "constant", "warmup_steps": 0},
    "train": {"micro_batch_size": 2, "sequence_length": 64, "eval_sequences": 4},
    "checkpoint": {"every": None, "keep": 50, "asynchronous": False},
    "observe": {"log_every": 1, "tensorboard": False},
}


LONG = ("model.head_dim=64", "model.max_sequence_length=512", "train.sequence_length=512", "train.batch_tokens=16384")


@dataclass(frozen=True)
class Bench:
    """The place of the runs, and their devices.

    Attributes:
        folder: for configs, corpora and run folders.
        device: `cuda` or `cpu`, of the runs that are to be proved.
        ranks: the largest number of ranks. The global batch is fixed, so runs on fewer ranks accumulate more.
        deadline: no program is started after it, and those that run are ended.
        tiny: whether to take fewer steps.
    """

    folder: Path
    device: str
    ranks: int
    deadline: Deadline
    tiny: bool

    @property
    def steps(self) -> int:
        """Steps that each run takes from the common checkpoint."""
        return 6 if self.tiny else 20

    @property
    def killed_steps(self) -> int:
        """Steps of the run that is killed, which saves after every second step."""
        return 10 if self.tiny else 24

    def run(self, name: str, *overrides: str, ranks: int = 1, device: str | None = None) -> Run:
        """A run of the small model, not started yet."""
        return Run(self, name, overrides, ranks, device or self.device)

    @property
    def config(self) -> Path:
        """The small model's YAML file."""
        return self.folder / "small.yaml"

    def write_config(self) -> None:
        """Write it, and a corpus beside it."""
        (self.folder / "sums.txt").write_text(TEXT, encoding="utf-8")
        sources = [{"name": "sums", "path": str(self.folder / "sums.txt")}]
        data = {"sources": sources, "cache_dir": str(self.folder / "cache"), "validation_fraction": 0.05}
        batch = {"steps": BEGUN + self.steps, "batch_tokens": 2 * self.ranks * 2 * 64}
        tree = {**MODEL, "runs_dir": str(self.folder / "runs"), "data": data, "train": MODEL["train"] | batch}
        self.config.write_text(yaml.safe_dump(tree), encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """One run by name; the same name goes on from its own checkpoints."""

    bench: Bench
    name: str
    overrides: Sequence[str]
    ranks: int
    device: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.bench.folder / "runs" / self.name

    def command(self, launcher: str = "torchrun") -> list[str]:
        """Return the command that starts `launch/pretrain.py`; `python` alone is one rank."""
        arguments = [
            *("--config", str(self.bench.config), f"name={self.name}", f"cluster.devices_per_node={self.ranks}"),
            f"cluster.device={'cpu' if self.device == 'cpu' else 'null'}",
            *self.overrides,
        ]
        return [*launch(launcher, self.ranks), str(ROOT / "launch" / "pretrain.py"), *arguments]

    def start(self, launcher: str = "torchrun") -> subprocess.Popen[bytes]:
        """Start it."""
        return start(self.command(launcher), environment(self.device), self.output)

    @property
    def output(self) -> Path:
        """All that its processes have printed, over all starts."""
        return self.bench.folder / f"{self.name}.out"

    def finish(self, launcher: str = "torchrun") -> str | None:
        """Run it to its end; None, or why it did not come to it."""
        if self.bench.deadline.passed():
            return NO_TIME
        return wait_within(self.bench.deadline, self.start(launcher), self.output, PATIENCE[self.bench.device])

    def losses(self) -> dict[int, float]:
        """The loss of each step, and the held-out one after the last as step -1."""
        found: dict[int, float] = {}
        for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "train/loss" in row:
                found[row["step"]] = row["train/loss"]
            if "eval/loss" in row:
                found[-1] = row["eval/loss"]
        return found

    def checkpoint(self, step: int | None = None) -> Path:
        """Its checkpoint of a step, or the newest."""
        saved = all_checkpoints(self.folder / "checkpoints")
        return next(path for path in reversed(saved) if step is None or step_of(path) == step)


def launch(launcher: str, ranks: int) -> list[str]:
    """Return the command for `ranks` processes of a program here: `torchrun`, `deepspeed`, or `python` for one."""
    if launcher == "deepspeed":
        visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device][:ranks]
        # With --num_gpus it would take the first devices, whichever are visible.
        devices = ["--include", f"localhost:{','.join(visible)}"] if visible else ["--num_gpus", str(ranks)]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *devices, "--master_port", str(_free_port())]
    if launcher == "python":
        return [sys.executable]
    return [*TORCHRUN, "--nproc-per-node", str(ranks)]


def begin_on_cpu(bench: Bench, precision: str) -> tuple[Run, Row | None]:
    """The CPU's run of one rank, from which the others begin; a row where it failed."""
    run = bench.run(f"cpu_{precision}", f"train.precision={precision}", f"checkpoint.every={BEGUN}", device="cpu")
    why = run.finish("python")
    return run, not_passed({"kind": "training", "check": f"{precision} on the CPU"}, why) if why else None


def as_on_a_cpu(bench: Bench, reference: Run, precision: str, zero: int, ranks: int, launcher: str) -> Row:
    """The devices' losses over the same steps from the same checkpoint, beside the CPU's."""
    name = f"{precision}_zero{zero}_ranks{ranks}_{launcher}"
    overrides = [f"train.precision={precision}", f"parallel.zero_stage={zero}", f"parallel.expert={ranks}"]
    run = bench.run(name, *overrides, f"checkpoint.resume={reference.checkpoint(BEGUN)}", ranks=ranks)
    bound = BOUNDS[precision]
    row = {
        "kind": "training",
        "check": f"{_setting(precision, zero, ranks)}, {launcher}",
        "passed": False,
        "steps": bench.steps,
        "bound": bound,
    }
    begun = time.monotonic()
    why = run.finish(launcher)
    row["seconds"] = time.monotonic() - begun
    if why:
        return not_passed(row, why)
    own, theirs = run.losses(), reference.losses()
    steps = range(BEGUN + 1, BEGUN + bench.steps + 1)
    if missing := [step for step in (*steps, -1) if step not in own]:
        return {**row, "detail": f"no loss of step {missing[0]}"}
    off = {step: abs(own[step] - theirs[step]) / abs(theirs[step]) for step in (*steps, -1)}
    row |= {"first_difference": off[BEGUN + 1], "largest_difference": max(off.values()), "last_loss": own[steps[-1]]}
    for step, value in off.items():
        if not value <= bound:  # NaN is not
            where = "held out" if step == -1 else f"step {step}"
            return {**row, "detail": f"{where}: {own[step]:.5g}, on the CPU {theirs[step]:.5g}, {value:.2%} off"}
    if theirs[steps[-1]] >= theirs[1]:
        return {**row, "detail": "the CPU's loss has not fallen: the comparison proves nothing"}
    return {**row, "passed": True}


def through_a_kill(bench: Bench, precision: str, zero: int, ranks: int) -> list[Row]:
    """The same run twice, and once killed with SIGKILL in the middle and started again: equal to the last bit.

    On a device with sequences and heads so long that attention's backward pass adds up several blocks.
    """
    setting = _setting(precision, zero, ranks)
    overrides = [
        *(f"train.precision={precision}", f"parallel.zero_stage={zero}", f"parallel.expert={ranks}"),
        *(f"train.steps={bench.killed_steps}", "checkpoint.every=2", *(LONG if bench.device == "cuda" else [])),
    ]
    name = f"kill_{precision}_zero{zero}_ranks{ranks}"
    whole, again, killed = (bench.run(f"{name}_{kind}", *overrides, ranks=ranks) for kind in ("one", "two", "killed"))
    repeat: Row = {"kind": "repeat", "check": f"{setting}: the same bits twice", "passed": False}
    resume: Row = {"kind": "resume", "check": f"{setting}: the same bits after SIGKILL", "passed": False}
    with ThreadPoolExecutor(2 if bench.device == "cuda" else 1) as pool:
        for why in pool.map(Run.finish, (whole, again)):
            if why:
                return [not_passed(row, why) for row in (repeat, resume)]
    if difference := _difference(whole, again):
        repeat["detail"] = difference
    else:
        repeat["passed"] = True
    step = _start_and_kill(killed)
    if step is None:
        ended = f"it ended before it could be killed: {last_line(killed.output)}"
        return [repeat, not_passed(resume, NO_TIME if bench.deadline.passed() else ended)]
    resume["killed_after_step"] = step
    why = killed.finish() or _difference(whole, killed)
    if why and why != NO_TIME and not repeat["passed"]:
        why = f"{why}; the run does not repeat itself without a kill either"
    return [repeat, not_passed(resume, why) if why else {**resume, "passed": True}]


def same_on_layouts(bench: Bench, precision: str, padded: bool) -> list[Row]:
    """`dsmoe parity` under torchrun: the same model on every layout of so many ranks, over every exchange."""
    ranks, layouts = bench.ranks, layouts_of(bench.ranks)
    exchange = "padded to a capacity" if padded else "dropless"
    row: Row = {
        "kind": "layouts",
        "check": f"{precision}, {exchange}, {ranks} ranks",
        "passed": False,
        "layouts": layouts,
    }
    settings = [
        f"cluster.devices_per_node={ranks}",
        f"cluster.device={'cpu' if bench.device == 'cpu' else 'null'}",
        *(["moe.capacity.factor=2.0", "moe.capacity.eval_factor=2.0"] if padded else []),
    ]
    command = [*launch("torchrun", ranks), "-m", "dsmoe", "parity", str(bench.config), *settings]
    options = ["--full", "--precision", precision, "--layouts", *layouts]
    output = bench.folder / f"layouts_{precision}_{'padded' if padded else 'dropless'}.out"
    begun = time.monotonic()
    why = wait_within(bench.deadline, start([*command, *options], environment(bench.device), output), output)
    row["seconds"] = time.monotonic() - begun
    different = [
        line for line in output.read_text(errors="replace", encoding="utf-8").splitlines() if "DIFFERENT" in line
    ]
    return [not_passed(row, different[0] if different else why) if why else {**row, "passed": True}]


def layouts_of(ranks: int) -> list[str]:
    """Layouts of so many ranks that between them use every exchange and every kind of group."""
    found = ["ep=1", f"ep={ranks},zero=2", f"ep={ranks},chunks=2", "tp=2,sp=true", "etp=2,zero=0"]
    if ranks >= 4:
        found += [f"ep={ranks},nodes=2,cluster.devices_per_node={ranks // 2},a2a=hierarchical"]
        found += [f"tp=2,sp=true,ep={ranks // 2},etp=2", f"ep={ranks // 2}"]
    return found


def environment(device: str) -> dict[str, str]:
    """For programs that train; those on a CPU do not see the machine's devices."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONFAULTHANDLER": "1", **hidden}


def start(command: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Start a program of this repository; what it prints is appended to `output`."""
    with output.open("ab") as file:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)


def wait_within(
    deadline: Deadline, process: subprocess.Popen[bytes], output: Path, patience: float = float("inf")
) -> str | None:
    """Wait for the end of a program; None, or why it was no good one, and then all of its output is printed.

    A program that is still running after `patience` seconds hangs: it is ended like one that there is no time for, but
    that is its own fault. Where its threads stood is at the end of its output.
    """
    why = None
    try:
        code = process.wait(timeout=max(min(deadline.left(), patience), 1.0))
        if code:
            why = f"exit code {code}: {last_line(output)}"
    except subprocess.TimeoutExpired:
        end_tree(process, stacks_seconds=STACKS_SECONDS)
        why = NO_TIME if deadline.passed() else f"still running after {patience:.0f} s"
    if why:
        _print_end(output)
    return why


def _print_end(output: Path) -> None:
    """Print the end of what a program has printed, for the stage's log."""
    text = output.read_text(errors="replace", encoding="utf-8") if output.exists() else ""
    print(f"--- {output.name}\n{text[-20_000:]}", flush=True)


def not_passed(row: Row, why: str) -> Row:
    """The row of a check that did not pass, or that there was no time for, which is not its fault."""
    return {**row, "passed": None if why == NO_TIME else False, "detail": why}


def _start_and_kill(run: Run) -> int | None:
    """Start the run and kill it as soon as a few checkpoints are there; after which step, None if it ended before."""
    process = run.start()
    checkpoints = run.folder / "checkpoints"
    while process.poll() is None and not run.bench.deadline.passed():
        if len(saved := all_checkpoints(checkpoints)) >= 2:
            end_tree(process)
            return step_of(saved[-1]) if process.returncode == -signal.SIGKILL else None
        time.sleep(0.002)
    end_tree(process, stacks_seconds=STACKS_SECONDS)
    _print_end(run.output)
    return None


def _difference(one: Run, two: Run) -> str | None:
    """Return the first difference between two runs of the same steps: a loss, or a file of the last checkpoint."""
    first, second = one.losses(), two.losses()
    for step in sorted(first.keys() | second.keys()):
        if first.get(step) != second.get(step):
            return f"the loss of step {step} is {second.get(step)} and was {first.get(step)}"
    newest, other = one.checkpoint(), two.checkpoint()
    if newest.name != other.name:
        return f"it ended at {other.name} and not at {newest.name}"
    expected, found = _tensors(newest), _tensors(other)
    for key in sorted(expected.keys() | found.keys()):
        if key not in expected or key not in found or not torch.equal(expected[key], found[key]):
            return f"{key} differs in {newest.name}"
    return None


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors in the files of a checkpoint, box by box; not torch's own random states, from which nothing is drawn."""
    manifest = verify(checkpoint)
    return {
        f"{key} {chunk.start}": read_tensor(checkpoint / chunk.file, tensor.dtype, chunk.shape, chunk.offset)
        for key, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if not key.startswith("rng/")
    }


def _setting(precision: str, zero: int, ranks: int) -> str:
    return f"{precision}, ZeRO {zero}, {quantity(ranks, 'rank')}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
