"""Tools of all benchmarks: a clock, a deadline, the circumstances, and figures that are kept as soon as they exist."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RESULTS = Path(__file__).parent / "results"
GIB = 2**30
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "liger-kernel")

Row = dict[str, Any]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
"""torchrun for one host, whose name need not be known to any name server."""


def seconds(action: Callable[[], object], device: str) -> float:
    """Measure the seconds of an action, with the device's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


class Deadline:
    """An instant after which nothing new is begun; without a number of seconds it never comes."""

    def __init__(self, allowed_seconds: float | None) -> None:
        self._end = None if allowed_seconds is None else time.monotonic() + allowed_seconds

    def left(self) -> float:
        """Seconds until then, 0 after it."""
        return float("inf") if self._end is None else max(self._end - time.monotonic(), 0.0)

    def passed(self) -> bool:
        """Return whether the time is over."""
        return self.left() == 0.0


@dataclass
class Rows:
    """Figures in the order in which they were measured.

    Where there is a file, each is appended to it at once as a line of JSON: what a killed process had measured stays.
    """

    file: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """The options by which `benchmarks.gpu` runs a program as a stage of its own."""
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append each row there at once, as a line of JSON")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so many seconds")


def circumstances(command: list[str], device: str, threads: int) -> Row:
    """Everything but the figures that somebody needs to measure again: command, date, hardware, driver, versions."""
    facts: Row = {
        "command": shlex.join(command),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(device),
        "threads": threads,
        "python": platform.python_version(),
        "packages": {package: _version_of(package) for package in PACKAGES},
    }
    if device == "cuda":
        facts |= {"devices": torch.cuda.device_count(), "driver": _driver(), "cuda": torch.version.cuda}
    return facts


def write(name: str, rows: list[Row], device: str, threads: int) -> None:
    """Keep the figures of the benchmark that was started, in `benchmarks/results/NAME.json`."""
    report = circumstances(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]], device, threads)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")


def hardware(device: str) -> str:
    """The name of the CUDA device, or of the processor as /proc/cpuinfo has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def free_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, encoding="utf-8"
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
