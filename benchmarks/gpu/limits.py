"""Stage 5: `launch/preflight.py` on this machine, and how far a healthy device is from the limits that it judges by.

    python -m benchmarks.gpu.limits --device cuda|cpu --ranks N [--known-as NAME] [--tiny] [--rows FILE] [--seconds S]

Preflight compares each rank with the median rank, and the device with its data sheet. Here one device is measured
several times and compared with its own median: what varies on one healthy device varies between healthy ones too.
`margin` is the worst measured share divided by the limit; below 1 preflight would refuse a healthy device.
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

from benchmarks.gpu.training import ROOT, environment, launch, not_passed, start, wait_within
from benchmarks.measuring import DTYPES, Deadline, Row, Rows, add_stage_options
from dsmoe.config import Config, load_config
from dsmoe.exit_codes import DONE
from dsmoe.plan.devices import KNOWN_DEVICES
from dsmoe.plan.plan import Plan
from dsmoe.plan.text import quantity
from dsmoe.preflight.judge import ON_DEVICES, ON_HOSTS
from dsmoe.preflight.judge.slow_devices import (
    CHECKSUM_TOLERANCE,
    FAR_TFLOPS,
    FREE_SHARE,
    MEMORY_SHARE,
    MET_TFLOPS,
    STORAGE_SHARE,
)
from dsmoe.preflight.measure import copy_rate, memory_gib, product_rate, write_rate
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
    return DONE


def preflight(
    path: Path, overrides: list[str], ranks: int, device: str, folder: Path, deadline: Deadline
) -> Iterator[Row]:
    """Preflight's own table, and the margins of the links; the check is that it comes to its end with numbers."""
    row: Row = {
        "kind": "checks",
        "check": f"preflight of {path.stem}, {quantity(ranks, 'rank')}, came to its end",
    }
    if deadline.left() < LEAST_SECONDS:
        yield {**row, "passed": None}
        return
    report, output = folder / "preflight.json", folder / "preflight.out"
    command = [*launch("torchrun", ranks), str(ROOT / "launch" / "preflight.py"), "--config", str(path)]
    process = start([*command, "--json", str(report), *overrides], environment(device), output)
    why = wait_within(deadline, process, output)
    if not report.exists():
        yield not_passed(row, why or "it left no numbers")
        return
    found = json.loads(report.read_text(encoding="utf-8"))
    findings = [finding["text"] for finding in found["findings"]]
    yield {**row, "passed": True, "exit_code": found["exit_code"], "seconds": found["seconds"], "findings": findings}
    limits = ON_DEVICES if device == "cuda" else ON_HOSTS
    for check in found["checks"]:
        name, promised, median = check["name"], check["promised"], check["median"]
        figures = {"check": name, "with": check["size"], "median": median, "unit": check["unit"]}
        yield {"kind": "preflight", **figures, **({"of_promise": median / promised} if promised else {})}
        if name.startswith("link"):
            yield _limit(name, limits.link, [check["worst"], median], check["unit"])
        if name.startswith("latency"):  # more is worse
            yield _limit(name, 1 / limits.latency, [1 / check["worst"], 1 / median], f"1/{check['unit']}")


def limits(config: Config, device: str, known_as: str | None, deadline: Deadline) -> Iterator[Row]:
    """Each limit beside what this device reaches, the one that matters most first."""
    on_cuda, where = device == "cuda", torch.device(device)
    used, side = (ON_DEVICES, 8192) if on_cuda else (ON_HOSTS, 512)
    square, dtype = Product(SQUARE, side, side, side), torch.bfloat16 if on_cuda else torch.float32
    facts = KNOWN_DEVICES.get(known_as) if known_as else None
    rates, sums = _again(partial(product_rate, square, where, dtype), deadline)
    yield _limit(f"compute, square product {square.shape}", used.compute, rates, "TFLOP/s")
    yield _limit("checksum of equal products", 1 - CHECKSUM_TOLERANCE, sums, "mean size", whole=max(sums))
    if facts is not None and facts.peak_tflops:
        for name, limit in (("a note", MET_TFLOPS), ("far off", FAR_TFLOPS)):
            yield _limit(f"peak rate, {name} below", limit, rates, "TFLOP/s", whole=facts.peak_tflops)
    total, free = memory_gib(where)
    if facts is not None and facts.memory_gib:
        yield _limit("memory, total", MEMORY_SHARE, [total], "GiB", whole=facts.memory_gib)
    if on_cuda:
        yield _limit("memory, free beside one context", FREE_SHARE, [free], "GiB", whole=total)
    copies, _ = _again(lambda: (copy_rate(where, (256 if on_cuda else 64) * 2**20), 0.0), deadline)
    yield _limit("compute, memory copy", used.compute, copies, "GB/s")
    with tempfile.TemporaryDirectory() as folder:
        writes, _ = _again(lambda: (write_rate(Path(folder) / "written"), 0.0), deadline)
    yield _limit("storage, this machine's", STORAGE_SHARE, writes, "GB/s")
    for product in products(Plan.from_config(config)):
        fitting = product.within(2**30 // 2, 2e13 if on_cuda else 2e9)
        name = f"compute, {product.name} product {fitting.shape}"
        if deadline.passed():
            yield {"kind": "checks", "check": name, "passed": None}
            continue
        rates, _ = _again(partial(product_rate, fitting, where, DTYPES[config.train.precision]), deadline)
        yield _limit(name, used.compute, rates, "TFLOP/s")


def _again(measure: Callable[[], tuple[float, float]], deadline: Deadline) -> tuple[list[float], list[float]]:
    """Both numbers of several measurements, of one at least."""
    measured = [measure()]
    while len(measured) < REPEATS and not deadline.passed():
        measured.append(measure())
    rates, sums = zip(*measured, strict=True)
    return list(rates), list(sums)


def _limit(name: str, limit: float, measured: list[float], unit: str, whole: float | None = None) -> Row:
    """The smallest of the numbers as a share of `whole`, or of their upper median, beside the least share allowed."""
    median = statistics.median_high(measured)
    share = min(measured) / (whole or median)
    figures = {"limit": limit, "worst_share": share, "margin": share / limit}
    return {"kind": "limit", "what": name, **figures, "median": median, "unit": unit, "repeats": len(measured)}


if __name__ == "__main__":
    sys.exit(main())
