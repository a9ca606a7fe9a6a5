"""Stage 5: `launch/preflight.py` on this machine, and how far a healthy device is from the limits that it judges by.

    python -m benchmarks.gpu.limits --device cuda --ranks N [--known-as NAME] [--tiny] [--rows FILE] [--seconds S]

A limit is of use only if a healthy device never falls below it: each is set beside what this one reaches, again and
again. `margin` is how many times the limit that was, at its worst.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.training import ROOT, environment, launch, start, wait_within
from benchmarks.measuring import DTYPES, Deadline, Row, Rows, add_stage_options
from dsmoe.config import Config, load_config
from dsmoe.plan.devices import KNOWN_DEVICES
from dsmoe.preflight.judge import ON_DEVICES, ON_HOSTS
from dsmoe.preflight.judge.devices import CHECKSUM_TOLERANCE, FAR_TFLOPS, FREE_SHARE, MEMORY_SHARE, MET_TFLOPS
from dsmoe.preflight.measure import copy_rate, memory_gib, product_rate
from dsmoe.preflight.results import SQUARE
from dsmoe.preflight.workload import Product, products

REPEATS = 5
LEAST_SECONDS = 10.0
"""Less is not enough for a preflight."""


def main() -> int:
    """Run preflight, then measure its limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--known-as", help="the device's name in dsmoe.plan.devices")
    parser.add_argument("--tiny", action="store_true")
    add_stage_options(parser)
    options = parser.parse_args()
    rows, deadline = Rows(options.rows), Deadline(options.seconds)
    path = ROOT / "configs" / ("tiny_cpu.yaml" if options.tiny else "small_8gpu.yaml")
    device = "cpu" if options.device == "cpu" else options.known_as
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *(f"cluster.devices_per_node={options.ranks}", f"parallel.expert={options.ranks}"),
            *(f"cluster.device={device or 'null'}", f"runs_dir={folder}"),
        ]
        for row in preflight(path, overrides, options.ranks, options.device, Path(folder), deadline):
            rows.add(row)
            print(row, flush=True)
        config = load_config(path, overrides)
    for row in limits(config, options.device, device, deadline):
        rows.add(row)
        print(row, flush=True)
    return 0


def preflight(
    path: Path, overrides: list[str], ranks: int, device: str, folder: Path, deadline: Deadline
) -> Iterator[Row]:
    """What preflight finds; its program has to end by itself, with numbers, whatever it thinks of them."""
    row: Row = {"kind": "checks", "check": f"preflight of {path.stem} on {ranks} rank{'s' * (ranks > 1)}"}
    if deadline.left() < LEAST_SECONDS:
        yield {**row, "passed": None}
        return
    report, output = folder / "preflight.json", folder / "preflight.out"
    command = [*launch("torchrun", ranks), str(ROOT / "launch" / "preflight.py"), "--config", str(path)]
    process = start([*command, "--json", str(report), *overrides], environment(device), output)
    why = wait_within(deadline, process, output)
    if not report.exists():
        yield {**row, "passed": False, "detail": why or "it left no numbers"}
        return
    found = json.loads(report.read_text())
    findings = [finding["text"] for finding in found["findings"]]
    yield {**row, "passed": True, "exit_code": found["exit_code"], "seconds": found["seconds"], "findings": findings}
    for check in found["checks"]:
        promised, median = check["promised"], check["median"]
        figures = {"check": check["name"], "with": check["size"], "median": median, "unit": check["unit"]}
        yield {"kind": "preflight", **figures, **({"of_promise": median / promised} if promised else {})}


def limits(config: Config, device: str, known_as: str | None, deadline: Deadline) -> Iterator[Row]:
    """Each limit beside what this device reaches, the one that matters most first."""
    on_cuda, where = device == "cuda", torch.device(device)
    used, side = (ON_DEVICES, 8192) if on_cuda else (ON_HOSTS, 512)
    square, dtype = Product(SQUARE, side, side, side), torch.bfloat16 if on_cuda else torch.float32
    facts = KNOWN_DEVICES.get(known_as) if known_as else None
    rates, sums = _again(partial(product_rate, square, where, dtype), deadline)
    yield _limit("compute", used.compute, min(rates) / statistics.median_high(rates), f"{square.shape}, again", rates)
    yield _limit("checksums", 1 - CHECKSUM_TOLERANCE, min(sums) / max(sums), "of equal products", sums)
    if facts is not None and facts.peak_tflops:
        share = min(rates) / facts.peak_tflops
        yield _limit("peak rate, a note below", MET_TFLOPS, share, f"of {facts.peak_tflops:g} TFLOP/s", rates)
        yield _limit("peak rate, far off below", FAR_TFLOPS, share, f"of {facts.peak_tflops:g} TFLOP/s", rates)
    total, free = memory_gib(where)
    if facts is not None and facts.memory_gib:
        yield _limit("memory, total", MEMORY_SHARE, total / facts.memory_gib, f"of {facts.memory_gib:g} GiB", [total])
    if on_cuda:
        yield _limit("memory, free", FREE_SHARE, free / total, "with this process' own context", [free])
    copies, _ = _again(lambda: (copy_rate(where, (256 if on_cuda else 64) * 2**20), 0.0), deadline)
    yield _limit("compute", used.compute, min(copies) / statistics.median_high(copies), "memory copy, GB/s", copies)
    for product in products(config):
        if deadline.passed():
            return
        fitting = product.within(2**30 // 2, 2e13 if on_cuda else 2e9)
        rates, _ = _again(partial(product_rate, fitting, where, DTYPES[config.train.precision]), deadline)
        with_ = f"{product.name}, {fitting.shape}"
        yield _limit("compute", used.compute, min(rates) / statistics.median_high(rates), with_, rates)


def _again(measure: Callable[[], tuple[float, float]], deadline: Deadline) -> tuple[list[float], list[float]]:
    """Both numbers of several measurements, of one at least."""
    measured = [measure()]
    while len(measured) < REPEATS and not deadline.passed():
        measured.append(measure())
    rates, sums = zip(*measured, strict=True)
    return list(rates), list(sums)


def _limit(name: str, limit: float, reached: float, what: str, numbers: list[float]) -> Row:
    row = {"kind": "limit", "limit": name, "is": limit, "reached": reached, "margin": reached / limit, "with": what}
    return {**row, "median": statistics.median_high(numbers), "repeats": len(numbers)}


if __name__ == "__main__":
    sys.exit(main())
