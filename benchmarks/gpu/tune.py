"""Time the kernels' block sizes over a small grid; `adopt` takes the best into the table that the kernels read.

    python -m benchmarks.gpu.tune --device cuda --rows tune.jsonl --seconds 60

A row `tune` per kernel, case and sizes; then per kernel a row `best`: the sizes that all cases together like best (the
geometric mean of their speed-ups), or the default ones where nothing beats them by 3 %. On a CPU it only rehearses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.measuring import Deadline, Row, Rows, add_stage_options, free_memory, hardware, seconds
from benchmarks.peers import SHAPES, Shape
from dsmoe.kernels import blocks
from dsmoe.kernels.blocks import SIZES, Sizes

WORTH = 1.03
"""What sizes have to gain to be taken: less is within what two measurements differ."""
TINY_SHAPES = (Shape("tiny", hidden=40, ffn=24, experts=5, top_k=2, tokens=9),)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Relative error allowed to results that differ from those of the default sizes at all."""

Tensors = tuple[torch.Tensor, ...]


def _grid(allowed: Callable[[Sizes], bool] = lambda sizes: True, **values: tuple[int, ...]) -> list[Sizes]:
    """Every combination that is allowed."""
    points = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return [point for point in points if allowed(point)]


def _elements_per_thread(sizes: Sizes) -> float:
    return sizes.get("tile", sizes.get("block", 0)) / (32 * sizes["warps"])


_ACTIVATION = _grid(
    lambda sizes: 8 <= _elements_per_thread(sizes) <= 16,
    tile=(1024, 2048, 4096),
    columns=(256, 512, 1024),
    warps=(4, 8),
)
GRID: dict[str, list[Sizes]] = {
    "bag_sum": _grid(columns=(512, 1024, 2048), columns_per_warp=(256, 512), unroll=(4, 8)),
    "activation_forward": _ACTIVATION,
    "activation_backward": _ACTIVATION,
    "topk_router": _grid(
        lambda sizes: 8 <= _elements_per_thread(sizes) <= 16, tile=(512, 1024, 2048, 4096), warps=(1, 2, 4, 8)
    ),
    "permute": _grid(lambda sizes: 1 <= _elements_per_thread(sizes) <= 2, block=(32, 64, 128), warps=(1, 2, 4)),
}
"""What is tried, by kernel in order of worth: nothing that spills registers on sm_90, no thread without an element."""


@dataclass(frozen=True)
class Case:
    """A call of a kernel: `inputs` are what it reads, to tell the bytes that it must move."""

    name: str
    inputs: Tensors
    run: Callable[[], Tensors]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as always on a CPU")
    add_stage_options(parser)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported, which has happened.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.tune", *(arguments or sys.argv[1:])])
    if options.device == "cuda" and blocks.capability() == "cpu":
        parser.error("--device cuda: there is no CUDA device; rehearse with --device cpu")
    shapes = (SHAPES["qwen3_30b_a3b"], SHAPES["mixtral_8x7b"])
    rows, deadline = Rows(options.rows), Deadline(options.seconds)
    for kernel in GRID:
        whole = None
        if not deadline.passed():
            whole = tune_kernel(
                kernel, TINY_SHAPES if options.tiny or options.device == "cpu" else shapes, rows, deadline
            )
            free_memory()
        rows.add({"kind": "checks", "check": f"{kernel}: the whole grid", "passed": whole})


def tune_kernel(kernel: str, shapes: Iterable[Shape], rows: Rows, deadline: Deadline) -> bool | None:
    """Measure the kernel's grid on all shapes, and add its rows and the best one.

    Returns:
        Whether the default sizes, with which others are compared, came out; None if there was no time for all points.
    """
    device = "cpu" if blocks.capability() == "cpu" else "cuda"
    default = blocks.read(blocks.TABLE)["default"][kernel]["sizes"]
    points = [default, *(point for point in GRID[kernel] if point != default)]
    cases: list[Case] = []
    for shape in shapes:
        try:
            cases += CASES[kernel](shape, device)
        except Exception as error:
            rows.add(_row(kernel, shape.name, default, True) | _as_error(error))
    found = []
    for row in measure(kernel, points, cases, partial(microseconds, device=device), deadline):
        found.append(row)
        rows.add(row)
        outcome = row.get("error") or f"{row['microseconds']:.1f} us, {row['gb_per_second']:.0f} GB/s"
        print(f"{kernel} {row['case']} {row['sizes']}{' (default)' * row['default']}: {outcome}", flush=True)
    winner = best(found, whole=not deadline.passed())
    if winner is not None:
        place = {"capability": blocks.capability(), "kernel": kernel}
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        rows.add({"kind": "best", **place, **winner, "device": hardware(device), "date": date})
        print(f"{kernel}: best {winner['sizes']}, {winner['speedup']:.3f} times the default's speed", flush=True)
    return None if deadline.passed() else winner is not None


def measure(
    kernel: str,
    points: list[Sizes],
    cases: list[Case],
    clock: Callable[[Callable[[], object]], float],
    deadline: Deadline,
) -> Iterator[Row]:
    """Time all cases at every point, the default first: a row each, with an error if it failed or came out wrong.

    `clock` takes microseconds. A case that failed at the default is not tried again.
    """
    expected: dict[str, Tensors] = {}
    for point in points:
        is_default = point is points[0]
        for case in cases:
            if deadline.passed():
                return
            if not is_default and case.name not in expected:
                continue
            row = _row(kernel, case.name, point, is_default)
            try:
                with sizes_set(kernel, point):
                    results = case.run()
                    if not is_default:
                        _check_same(results, expected[case.name])
                    taken = clock(case.run)
                moved = sum(tensor.nbytes for tensor in (*case.inputs, *results))
                row |= {"microseconds": taken, "gb_per_second": moved / taken / 1e3}
                if is_default:
                    expected[case.name] = results
            except Exception as error:
                row |= _as_error(error)
            yield row


def best(rows: list[Row], whole: bool) -> Row | None:
    """Sizes and speed-up of a kernel's best point, of those that were right in every case.

    The default's speed-up is 1.0 where nothing else is worth it; None if the default was not measured, or is the best
    of no more than a part of the grid.
    """
    taken: dict[str, dict[str, float]] = {}
    default = ""
    for row in rows:
        if "error" not in row:
            sizes = json.dumps(row["sizes"])
            taken.setdefault(sizes, {})[row["case"]] = row["microseconds"]
            default = sizes if row["default"] else default
    if not default:
        return None
    speedups = {
        sizes: statistics.geometric_mean(taken[default][case] / times[case] for case in taken[default])
        for sizes, times in taken.items()
        if times.keys() == taken[default].keys()
    }
    fastest = max(speedups, key=speedups.__getitem__)
    if speedups[fastest] >= WORTH:
        return {"sizes": json.loads(fastest), "speedup": speedups[fastest]}
    return {"sizes": json.loads(default), "speedup": 1.0} if whole else None


def adopt(rows: Iterable[Row], table_path: Path = blocks.TABLE) -> list[str]:
    """Take the rows `best` into the table, each in its capability's and kernel's place; all others stay.

    Returns:
        What was taken, such as `sm_90.bag_sum`.

    Raises:
        ValueError: the rows are a CPU's rehearsal, or the table would be malformed; it is then left as it was.
    """
    table = blocks.read(table_path)
    adopted = []
    for row in rows:
        if row.get("kind") != "best":
            continue
        if row["capability"] == "cpu":
            raise ValueError("the rows are a rehearsal on a CPU; adopt those of a run on a CUDA device")
        entry = {key: row[key] for key in ("date", "device", "sizes")}
        table.setdefault(row["capability"], {})[row["kernel"]] = entry
        adopted.append(f"{row['capability']}.{row['kernel']}")
    blocks.check(table, table_path)
    table_path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return adopted


@contextmanager
def sizes_set(kernel: str, sizes: Sizes) -> Iterator[None]:
    """Set the kernel's sizes."""
    before, SIZES[kernel] = SIZES[kernel], sizes
    try:
        yield
    finally:
        SIZES[kernel] = before


def microseconds(run: Callable[[], object], device: str) -> float:
    """Measure a launch in microseconds: on a GPU the median of launches that find the L2 cache empty."""
    if device == "cpu":
        return 1e6 * seconds(run, device)
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=10, rep=40, return_mode="median")


def _row(kernel: str, case: str, sizes: Sizes, default: bool) -> Row:
    return {"kind": "tune", "kernel": kernel, "case": case, "sizes": sizes, "default": default}


def _as_error(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"[:300]}


def _check_same(results: Tensors, expected: Tensors) -> None:
    for result, other in zip(results, expected, strict=True):
        if torch.equal(result, other):
            continue
        near = ROUNDING.get(other.dtype)
        # Sums of both signs may come near 0: there the largest counts.
        if near is None or not torch.allclose(result, other, rtol=near, atol=1e-5 * other.abs().max().item()):
            raise ArithmeticError("the result differs from that of the default sizes")


def _bag_sum(shape: Shape, device: str) -> list[Case]:
    from dsmoe.kernels.bag_sum import bag_sum

    num_rows = shape.tokens * shape.top_k
    source_TD = torch.randn(shape.tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    rows_ND = torch.randn(num_rows, shape.hidden, device=device, dtype=torch.bfloat16)
    assignment_N = torch.randperm(num_rows, device=device)
    source_N1, row_TK = (assignment_N // shape.top_k)[:, None], assignment_N.argsort().view(-1, shape.top_k)
    return [
        Case(f"{shape.name} gather", (source_TD, source_N1), lambda: (bag_sum(source_TD, source_N1),)),
        Case(f"{shape.name} combine", (rows_ND, row_TK), lambda: (bag_sum(rows_ND, row_TK),)),
    ]


def _activation_inputs(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, weights and ends, balanced."""
    num_rows = shape.tokens * shape.top_k
    z_NZ = torch.randn(num_rows, 2 * shape.ffn, device=device, dtype=torch.bfloat16)
    ends_E = torch.arange(1, shape.experts + 1, device=device) * num_rows // shape.experts
    return z_NZ, torch.rand(num_rows, device=device), ends_E.int()


def _activation_forward(shape: Shape, device: str) -> list[Case]:
    from dsmoe.kernels.weighted_activation import weighted_activation
    from dsmoe.nn.activations import ACTIVATIONS

    inputs = _activation_inputs(shape, device)
    return [Case(shape.name, inputs, lambda: (weighted_activation(*inputs, ACTIVATIONS["swiglu"]),))]


def _activation_backward(shape: Shape, device: str) -> list[Case]:
    from dsmoe.kernels.weighted_activation import weighted_activation_backward
    from dsmoe.nn.activations import ACTIVATIONS

    grad_NI = torch.randn(shape.tokens * shape.top_k, shape.ffn, device=device, dtype=torch.bfloat16)
    inputs = (grad_NI, *_activation_inputs(shape, device))
    return [Case(shape.name, inputs, lambda: weighted_activation_backward(*inputs, ACTIVATIONS["swiglu"]))]


def _topk_router(shape: Shape, device: str) -> list[Case]:
    from dsmoe.kernels.topk_router import _Route, route
    from dsmoe.moe.scores import SCORES, TINY

    softmax = SCORES["softmax"]
    rule = (softmax, True, 1.0, TINY)
    # Coarse, so that logits are equal or far apart, and no rounding changes their order.
    logits_TE = torch.randn(shape.tokens, shape.experts, device=device).mul_(64).round_().div_(64)
    scores_TE, weights_TK, experts_TK = route(logits_TE, None, None, shape.top_k, *rule)
    grads = torch.randn_like(scores_TE), torch.randn_like(weights_TK)
    context = SimpleNamespace(saved_tensors=(scores_TE, experts_TK), rule=(softmax.kernel, *rule[1:]))
    return [
        Case(f"{shape.name} forward", (logits_TE,), lambda: route(logits_TE, None, None, shape.top_k, *rule)),
        # Without autograd, which would take longer on the host than the kernel on the device.
        Case(
            f"{shape.name} backward",
            (scores_TE, experts_TK, *grads),
            lambda: _Route.backward(context, *grads, None)[:1],
        ),
    ]


def _permute(shape: Shape, device: str) -> list[Case]:
    from dsmoe.kernels.permute import sort_by_expert

    experts_TK = torch.randint(0, shape.experts, (shape.tokens, shape.top_k), device=device)
    return [Case(shape.name, (experts_TK,), lambda: sort_by_expert(experts_TK, shape.experts))]


CASES: dict[str, Callable[[Shape, str], list[Case]]] = {
    "bag_sum": _bag_sum,
    "activation_forward": _activation_forward,
    "activation_backward": _activation_backward,
    "topk_router": _topk_router,
    "permute": _permute,
}
"""What each kernel is timed on."""


if __name__ == "__main__":
    main()
