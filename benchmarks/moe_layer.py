"""Forward and forward + backward of one MoE layer, every peer in one process, interleaved; medians and ratios.

    python -m benchmarks.moe_layer --shapes A B --dtypes bf16 fp32 --routing balanced zipf --repeats 9

The ratio to the dense floor and to peers is what counts: absolute times on a shared machine mean little. So does the
share of the rate at which the same process multiplies large square matrices. Writes
`benchmarks/results/moe_layer_DEVICE.json` with hardware, versions and the command; or, with `--rows`, each row to that
file as soon as it is known.

Settings (shape, dtype, tokens, routing) are measured in order of worth: first that of the first value of each option,
then those that differ from it in one, and so on. In each, dsmoe comes first. A peer that cannot be made or whose pass
fails is left out with a row that says why.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import (
    DTYPES,
    GIB,
    Deadline,
    Row,
    Rows,
    add_stage_options,
    first_line,
    free_memory,
    seconds,
    write,
)
from benchmarks.peers import PEERS, SHAPES, Peer, Shape, check_memory
from dsmoe.preflight.measure import product_rate
from dsmoe.preflight.workload import Product

OURS, FLOOR = "dsmoe dropless", "dense floor"
RISKY = ("liger grouped",)
"""Kernels of others that may take minutes to compile, or leave the CUDA context unusable: measured after all else."""
LEAST_REPEATS = 3
"""Where time runs out; fewer where fewer are asked for."""
KERNELS = 12
"""How many of the kernels that take longest are shown of a profile."""
SQUARE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that measure what a product can reach."""


@dataclass(frozen=True)
class Setting:
    """One thing that all peers do."""

    shape: Shape
    dtype: str
    routing: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape.name}, {self.shape.tokens:,} tokens, {self.routing}, {self.dtype}"

    def row(self, kind: str, **figures: Any) -> Row:
        """A row of this setting."""
        where = {"shape": self.shape.name, "dtype": self.dtype, "routing": self.routing, "tokens": self.shape.tokens}
        return {"kind": kind, **where, **figures}


@dataclass
class Times:
    """Measurements of a peer; seconds per round."""

    saved_bytes: int
    peak_bytes: int | None
    forward: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of the shape's own")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--routing", nargs="+", default=["balanced", "zipf"], choices=["balanced", "zipf"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help=f"the {KERNELS} kernels that take longest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_stage_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.rows)
    measure_all(options, rows, Deadline(options.seconds))
    if options.rows is None:
        write(f"moe_layer_{options.device}", rows.rows, options.device, options.threads)


def measure_all(options: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    """Every setting with the peers that are safe, then with the others, each time beside the floor."""
    reference = FLOOR if FLOOR in options.peers else options.peers[0]
    safe = [name for name in options.peers if name not in RISKY]
    risky = [name for name in options.peers if name in RISKY]
    for names in filter(None, (safe, [*risky, reference] if risky else [])):
        for setting in settings(options):
            reached = not (rows.rows and deadline.passed())
            if reached:
                Measurement(setting, options, rows, deadline, reference).take(names)
            for name in names if rows.file is not None else []:
                if name.startswith("dsmoe"):  # what a stage owes; others may be left out
                    row = _row_of(rows, setting, name)
                    passed = row is not None and "error" not in row if reached else None
                    rows.add({"kind": "checks", "check": f"{name}, {setting.name}", "passed": passed})


def settings(options: argparse.Namespace) -> list[Setting]:
    """All combinations, in order of worth."""
    axes = [options.shapes, options.dtypes, options.tokens or [None], options.routing]
    places = sorted(itertools.product(*(range(len(axis)) for axis in axes)), key=sum)
    found = []
    for place in places:
        name, dtype, tokens, routing = (axis[index] for axis, index in zip(axes, place, strict=True))
        shape = SHAPES[name]
        found.append(Setting(shape if tokens is None else replace(shape, tokens=tokens), dtype, routing))
    return found


class Measurement:
    """Peers on one setting, and the rows of it."""

    def __init__(
        self, setting: Setting, options: argparse.Namespace, rows: Rows, deadline: Deadline, reference: str
    ) -> None:
        self.setting, self.options, self.rows, self.deadline = setting, options, rows, deadline
        self.reference = reference
        self.device: str = options.device
        self.layers: dict[str, Peer] = {}
        self.times: dict[str, Times] = {}

    def take(self, names: list[str]) -> None:
        """Time round robin, so that a busy moment hits all alike; then a row each, and the profiles."""
        free_memory()  # of the setting before
        rate = matrix_rate(self.setting.dtype, self.device, self.rows)
        self.x_TD, self.router_ED, self.grad_TD = inputs(
            self.setting.shape, DTYPES[self.setting.dtype], self.setting.routing, self.device
        )
        for name in sorted(names, key=lambda name: name != OURS):
            if self.layers and self.deadline.passed():
                break
            self._guarded(name, self._prepare)
        if all(_row_of(self.rows, self.setting, name) for name in self.layers):
            return
        for number in range(self.options.repeats):
            if number >= min(LEAST_REPEATS, self.options.repeats) and self.deadline.passed():
                break
            for name in list(self.layers):
                self._guarded(name, self._round)
        self._print_head()
        for name in names:
            if name in self.times:
                self._report(name, rate)
        for name in self._worth_a_profile():
            if not self.deadline.passed():
                self._guarded(name, self._profile, "kernel")

    def _guarded(self, name: str, action: Callable[[str], None], kind: str = "layer") -> None:
        """Do it with that peer; where it fails, the peer is out, with a row that says why, and its memory is free."""
        try:
            action(name)
            return
        except Exception as error:  # whatever another library raises: the others go on
            reason = first_line(error)
        self.layers.pop(name, None)
        self.times.pop(name, None)
        self.x_TD.grad = None
        try:
            free_memory()
        except RuntimeError as error:  # an illegal access stays with the context
            print(f"{name}: {error}", file=sys.stderr)
        print(f"{name}: left out ({reason})", file=sys.stderr)
        if kind != "layer" or not _row_of(self.rows, self.setting, name):
            self.rows.add(self.setting.row(kind, peer=name, error=reason))

    def _prepare(self, name: str) -> None:
        """Make the layer, and warm up: what is compiled or tuned in a first pass does not count."""
        check_memory(name, self.setting.shape, self.x_TD, self.router_ED)
        layer = Peer(name, self.setting.shape, self.router_ED)
        saved, peak = saved_bytes(layer, self.x_TD), None
        layer.train(self.x_TD, self.grad_TD)
        layer.clear(self.x_TD)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer.train(self.x_TD, self.grad_TD)
            peak = torch.cuda.max_memory_allocated() - before
            layer.clear(self.x_TD)
            torch.cuda.synchronize()  # where a kernel fails, it is this peer's
        self.layers[name], self.times[name] = layer, Times(saved, peak)

    def _round(self, name: str) -> None:
        layer, times = self.layers[name], self.times[name]
        forward = seconds(partial(layer.forward, self.x_TD), self.device)
        training = seconds(partial(layer.train, self.x_TD, self.grad_TD), self.device)
        layer.clear(self.x_TD)
        times.forward.append(forward)
        times.training.append(training)

    def _print_head(self) -> None:
        shape = self.setting.shape
        print(
            f"\n{shape.name}: {shape.hidden} x {shape.ffn}, {shape.experts} experts top {shape.top_k}, "
            f"{shape.tokens:,} tokens, {self.setting.dtype}, {self.setting.routing}"
        )
        print(
            f"{'':<34}{'forward ms':>12}{'ratio':>8}{'training ms':>13}{'ratio':>8}{'TFLOP/s':>9}{'of product':>12}"
            f"{'peak GiB':>10}{'saved KiB/token':>17}"
        )

    def _report(self, name: str, rate: float) -> None:
        row = summarise(self.setting.shape, self.times[name], self.times.get(self.reference), rate)
        ratios = [f"{row[key]:.2f}" if row[key] else "" for key in ("forward_ratio", "training_ratio")]
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        print(
            f"{name:<34}{row['forward_ms']:>12.1f}{ratios[0]:>8}{row['training_ms']:>13.1f}{ratios[1]:>8}"
            f"{row['training_tflops']:>9.2f}{row['share_of_matrix_rate']:>12.0%}{peak:>10}"
            f"{row['saved_kib_per_token']:>17.1f}",
            flush=True,
        )
        if not _row_of(self.rows, self.setting, name):
            self.rows.add(self.setting.row("layer", peer=name, **row))

    def _worth_a_profile(self) -> list[str]:
        """Ours, and the fastest of the others so far (the floor is none); of further numbers of tokens nobody."""
        tokens = self.options.tokens
        if not self.options.profile or (tokens and self.setting.shape.tokens != tokens[0]):
            return []
        measured = [row for row in self.rows.rows if _is_of(row, self.setting) and row["peer"] not in (OURS, FLOOR)]
        measured = [row for row in measured if "training_ms" in row and not row["peer"].startswith("dsmoe")]
        best = min(measured, key=lambda row: row["training_ms"])["peer"] if measured else None
        done = {row["peer"] for row in self.rows.rows if _is_of(row, self.setting, "kernel")}
        return [name for name in (OURS, best) if name in self.layers and name not in done]

    def _profile(self, name: str) -> None:
        """A training pass, kernel by kernel."""
        layer = self.layers[name]
        on_cuda = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            seconds(partial(layer.train, self.x_TD, self.grad_TD), self.device)
        layer.clear(self.x_TD)
        # With CUDA there are the kernels, and the operators that started them, which would count them again.
        events = [event for event in profiler.key_averages() if not on_cuda or event.device_type == DeviceType.CUDA]
        taken = [(event.self_device_time_total if on_cuda else event.self_cpu_time_total, event) for event in events]
        total = sum(microseconds for microseconds, _ in taken)
        if not total:
            raise RuntimeError("the profiler saw nothing")
        print(f"\n{name}, a training pass of {total / 1e3:.2f} ms by {'kernel' if on_cuda else 'operator'}:")
        for microseconds, event in sorted(taken, key=lambda pair: -pair[0])[:KERNELS]:
            figures = {"calls": event.count, "ms": microseconds / 1e3, "percent": 100 * microseconds / total}
            row = self.setting.row("kernel", peer=name, name=event.key[:80], **figures)
            self.rows.add(row)
            print(f"{row['ms']:>10.3f} ms{row['percent']:>7.1f} %{row['calls']:>6} x  {row['name']}", flush=True)


def _is_of(row: Row, setting: Setting, kind: str = "layer") -> bool:
    return row.items() >= setting.row(kind).items()


def _row_of(rows: Rows, setting: Setting, peer: str) -> Row | None:
    """Return the figures of a peer so far."""
    return next((row for row in rows.rows if _is_of(row, setting) and row["peer"] == peer), None)


def matrix_rate(dtype: str, device: str, rows: Rows) -> float:
    """TFLOP/s of a large square product; measured once per dtype, with a row of its own."""
    for row in rows.rows:
        if row["kind"] == "matrix_rate" and row["dtype"] == dtype:
            return row["tflops"]
    size = SQUARE["cuda" if device == "cuda" else "cpu"]
    rate, _ = product_rate(Product("square", size, size, size), torch.device(device), DTYPES[dtype])
    rows.add({"kind": "matrix_rate", "dtype": dtype, "size": size, "tflops": rate})
    print(f"{size} x {size} x {size} product in {dtype}: {rate:.2f} TFLOP/s", flush=True)
    return rate


def summarise(shape: Shape, times: Times, floor: Times | None, rate: float) -> dict[str, Any]:
    """Medians, and the median over rounds of the ratio to the floor in the same round; None without a floor."""
    result: dict[str, Any] = {}
    for kind in ("forward", "training"):
        taken = getattr(times, kind)
        result[f"{kind}_ms"] = statistics.median(taken) * 1e3
        pairs = zip(taken, getattr(floor, kind), strict=True) if floor else []
        ratios = [own / floors for own, floors in pairs]
        result[f"{kind}_ratio"] = statistics.median(ratios) if ratios else None
    result["forward_tflops"] = shape.forward_flops / statistics.median(times.forward) / 1e12
    result["training_tflops"] = shape.training_flops / statistics.median(times.training) / 1e12
    result["share_of_matrix_rate"] = result["training_tflops"] / rate
    result["saved_kib_per_token"] = times.saved_bytes / shape.tokens / 1024
    if times.peak_bytes is not None:
        result["peak_gib"] = times.peak_bytes / GIB
    result["repeats"] = len(times.training)
    return result


def inputs(
    shape: Shape, dtype: torch.dtype, routing: str, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, router weight, output gradient. Zipf: through a constant feature, expert e's logit loses log(e + 1)."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x_TD, router_ED = normal(shape.tokens, shape.hidden), normal(shape.experts, shape.hidden) * shape.hidden**-0.5
    x_TD[:, 0] = 1.0
    ranks_E = torch.arange(1, shape.experts + 1, device=device).float()
    router_ED[:, 0] = -ranks_E.log() if routing == "zipf" else 0.0
    return x_TD.to(dtype).requires_grad_(), router_ED.to(dtype), normal(shape.tokens, shape.hidden).to(dtype)


def saved_bytes(peer: Peer, x_TD: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out; the input counts."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in peer.layer.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        peer.forward(x_TD)
    return sum(storages.values())


if __name__ == "__main__":
    main()
