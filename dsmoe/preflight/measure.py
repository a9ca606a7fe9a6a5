"""Timings of this rank's device and of the wires to the others; each function returns numbers and judges nothing.

A time is the median of several: one hiccup does not move it, and what is slow half of the time does not hide in a best
one. On CUDA the device's own events take it, from the end of what came before to the end of what is timed, since a
launch returns long before its kernel does. A CPU's products and copies are timed by the seconds that this process had
the CPU, because one that waits for others to have theirs is not slow.

Functions of the second half are collective. Their sizes are cut until a repetition takes no more than a moment on the
slowest link of all, so that one bad cable does not make the others wait for minutes; all ranks cut alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsmoe.preflight.results import Link
from dsmoe.preflight.workload import Message, Product
from dsmoe.runtime.watchdog import record_position

WINDOW_SECONDS = 0.5
"""Seconds for which each product and copy is repeated."""
BATCH_SECONDS = 0.02
REPEATS = 5
PROBE_BYTES = 2**20
LINK_BYTES = 64 * 2**20
MOMENT_SECONDS = 0.25
"""Most seconds of one repetition of a transfer."""
TINY_REPEATS = 20
STORAGE_BYTES, STORAGE_PIECE, STORAGE_SECONDS = 64 * 2**20, 4 * 2**20, 2.0
GIB = 2**30


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Total and free memory of the device, or of the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total / GIB, free / GIB
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total / GIB, free / GIB


def product_rate(product: Product, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """TFLOP/s of `product`, as training computes it, and the mean size of the numbers in it.

    The factors are the same normal numbers on every rank. Not zeros, with which a device draws less power and runs
    faster than it will.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows_ND = torch.randn(product.rows, product.inner, dtype=dtype, device=device, generator=generator)
    shape = (product.count, product.width, product.inner)
    weights_LZD = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    each = product.rows // product.count
    ends_L = torch.arange(each, product.rows + 1, each, dtype=torch.int32, device=device)
    out_NZ = rows_ND.new_empty(product.rows, product.width)

    def multiply() -> torch.Tensor:
        if product.count > 1 and device.type == "cuda":
            return F.grouped_mm(rows_ND, weights_LZD.transpose(-2, -1), offs=ends_L)
        for expert, part in enumerate(rows_ND.split(each)):
            torch.mm(part, weights_LZD[expert].t(), out=out_NZ[expert * each :][:each])
        return out_NZ

    checksum = float(multiply().abs().mean(dtype=torch.float64))
    return product.flops / _seconds(multiply, device) / 1e12, checksum


def copy_rate(device: torch.device, size: int) -> float:
    """GB/s that a copy of `size` bytes within the device's memory reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device) / 1e9


def write_rate(path: Path) -> float:
    """GB/s at which a file is written until the storage says it has it; leaves the file, empty."""
    piece = os.urandom(STORAGE_PIECE)  # which no file system can compress
    begun, written = time.perf_counter(), 0
    with path.open("wb") as file:
        while written < STORAGE_BYTES and time.perf_counter() - begun < STORAGE_SECONDS:
            written += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
        file.truncate(0)
    return written / seconds / 1e9


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one `action`, done often enough in a row that launching it does not count."""
    _timed(action, 2, device)  # the first calls choose kernels and allocate
    runs = max(1, int(BATCH_SECONDS / max(_timed(action, 1, device), 1e-7)))
    seconds: list[float] = []
    deadline = time.perf_counter() + WINDOW_SECONDS
    while len(seconds) < 3 or time.perf_counter() < deadline:
        seconds.append(_timed(action, runs, device, _cpu_clock) / runs)
    return statistics.median(seconds)


def _timed(
    action: Callable[[], object], runs: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds until `runs` of `action` are done; by `clock` where there are no events."""
    if device.type != "cuda":
        begun = clock()
        for _ in range(runs):
            action()
        return clock() - begun
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _cpu_clock() -> float:
    """Seconds that each of torch's threads has computed, on average."""
    return time.process_time() / torch.get_num_threads()


def largest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)


def wait_for_all(device: torch.device) -> None:
    """A barrier; not torch's, which over NCCL warns of a device that it was not given."""
    largest(0.0, device)


def link_rates(partners: Sequence[int | None], device: torch.device, most_bytes: int) -> list[Link]:
    """Exchange with `partners`, one after the other; None sits out a round.

    Every rank of the world calls this with as many rounds, in each of which partners name each other. All pairs of a
    round exchange at the same time, and a round begins when the one before has ended everywhere.
    """
    small = [torch.zeros(4, dtype=torch.uint8, device=device) for _ in range(2)]
    probe = [torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    tiny: dict[int, float] = {}
    slowest = 0.0
    for number, partner in enumerate(partners):
        _begin_round(f"latency, round {number + 1} of {len(partners)}", partner, device)
        if partner is not None:
            _exchange(partner, *small)
            tiny[number] = _timed(partial(_exchange, partner, *small), TINY_REPEATS, device) / TINY_REPEATS
            slowest = max(slowest, _timed(partial(_exchange, partner, *probe), 1, device))
    size = _fitting(LINK_BYTES, largest(slowest, device), most_bytes)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    links = []
    for number, partner in enumerate(partners):
        _begin_round(f"bandwidth, round {number + 1} of {len(partners)}", partner, device)
        if partner is not None:
            _exchange(partner, *small)
            times = [_timed(partial(_exchange, partner, *buffers), 1, device) for _ in range(REPEATS)]
            links.append(Link(partner, size / statistics.median(times) / 1e9, tiny[number] * 1e6))
    return links


def collective_rate(
    message: Message, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, most_bytes: int
) -> tuple[float, int]:
    """GB/s that this device sends during `message`, and of how many bytes; all groups of the world at once."""

    def action(size: int) -> Callable[[], object]:
        numbers = max(size // dtype.itemsize // message.size, 1) * message.size
        buffer, received = (torch.zeros(numbers, dtype=dtype, device=device) for _ in range(2))
        if message.operation == "all_reduce":
            return lambda: dist.all_reduce(buffer, group=group)
        return lambda: dist.all_to_all_single(received, buffer, group=group)

    probe = action(min(message.bytes, PROBE_BYTES))
    _begin_round(message.name, None, device)
    _timed(probe, 1, device)  # makes the connections
    slowest = largest(_timed(probe, 1, device), device)
    size = _fitting(message.bytes, slowest, most_bytes)
    run = action(size)
    _timed(run, 1, device)
    seconds = statistics.median(_timed(run, 1, device) for _ in range(REPEATS))
    return size * message.bus_factor / seconds / 1e9, size


def _begin_round(what: str, partner: int | None, device: torch.device) -> None:
    record_position(what if partner is None else f"{what} with rank {partner}")
    wait_for_all(device)


def _exchange(peer: int, sent: torch.Tensor, received: torch.Tensor) -> None:
    """Send to `peer` and receive from it at the same time."""
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _fitting(wanted: int, probe_seconds: float, most_bytes: int) -> int:
    """Limit the `wanted` bytes to those that a moment and the memory allow, by the seconds that the probe took."""
    in_time = int(PROBE_BYTES * MOMENT_SECONDS / max(probe_seconds, 1e-6))
    return min(wanted, max(in_time, PROBE_BYTES), most_bytes)
