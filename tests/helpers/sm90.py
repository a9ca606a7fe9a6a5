"""Compiles every launch of the kernels for an H100, on any machine: writes what it became to a file, as JSON.

With it, what the compiler says of scores and activations that the kernels have no branch for.

Those of the default sizes; of others also, but for bf16 only: some of the tests' own, and the table's for an H100.

Run as a program of its own that is given the file, without Triton's interpreter. The functions are called as ever, so
that the signatures, alignments and block sizes are the real ones; the launch itself is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from dsmoe.kernels.bag_sum import bag_sum
from dsmoe.kernels.blocks import SIZES, TABLE, choose, read
from dsmoe.kernels.permute import sort_by_expert
from dsmoe.kernels.topk_router import _Route, route
from dsmoe.kernels.weighted_activation import weighted_activation, weighted_activation_backward
from dsmoe.moe.scores import SCORES
from dsmoe.nn.activations import ACTIVATIONS
from tests.helpers import made_up_entries
from tests.kernels import OTHER_SIZES

T, D, E, K, INNER = 1000, 2048, 128, 8, 768
"""Qwen3-30B-A3B's shape; T is odd on purpose: nothing may rely on it."""


class NoDriver:
    """Stands in for the CUDA driver as far as compiling goes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    reports: dict[str, dict[str, int]] = {}
    launch = JITFunction.run
    case = ""

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        reports[f"{case}{self.__name__}"] = report(kernel)

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(NoDriver())
    table = read(TABLE)
    sets = {"": choose(table, "default"), "others: ": {kernel: others[0] for kernel, others in OTHER_SIZES.items()}}
    if "sm_90" in table:
        sets["table: "] = choose(table, "sm_90")
    for name, sizes in sets.items():
        SIZES.update(sizes)
        for part in launches(all_dtypes=not name):
            case = name + part
    found = {"launches": reports, "refusals": refusals()}
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


def launches(all_dtypes: bool) -> Iterator[str]:
    """Call the kernels, each time after having said what the case is."""
    ends_L = torch.zeros(E, dtype=torch.int32)
    dtypes = {torch.bfloat16: ("swiglu", "geglu", "gelu", "relu2"), torch.float32: ("swiglu",)}
    for dtype, names in dtypes.items() if all_dtypes else [(torch.bfloat16, ("swiglu",))]:
        for name in names:
            yield f"{dtype} {name}"
            z_NZ = torch.zeros(T, INNER * (2 if ACTIVATIONS[name].gated else 1), dtype=dtype)
            hidden_NI = weighted_activation(z_NZ, torch.zeros(T), ends_L, ACTIVATIONS[name])
            weighted_activation_backward(hidden_NI, z_NZ, torch.zeros(T), ends_L, ACTIVATIONS[name])
        for size in (K, 1):
            yield f"{dtype} bags of {size}"
            bag_sum(torch.zeros(T, D, dtype=dtype), torch.zeros(T, size, dtype=torch.int64))
    yield ""
    sort_by_expert(torch.zeros(T, K, dtype=torch.int64), E)
    for score, bias_E, preference_TE in (
        ("softmax", None, None),
        ("softmax", None, torch.zeros(T, E)),
        ("sigmoid", torch.zeros(E), None),
    ):
        yield score if preference_TE is None else f"{score} by preference"
        logits_TE = torch.zeros(T, E, requires_grad=True)
        scores_TE, weights_TK, _ = route(logits_TE, bias_E, preference_TE, K, SCORES[score], True, 1.0, 1e-20)
        (scores_TE.sum() + weights_TK.sum()).backward()


def refusals() -> list[str]:
    """What is said of a made-up score and a made-up activation, in the forward and the backward kernel."""
    softplus, tanh = replace(made_up_entries.SOFTPLUS, kernel="softplus"), replace(made_up_entries.TANH, kernel="tanh")
    z_NZ, weight_N, ends_E = torch.zeros(T, INNER), torch.zeros(T), torch.zeros(E, dtype=torch.int32)
    scores_TE, experts_TK = torch.zeros(T, E), torch.zeros(T, K, dtype=torch.int64)
    context = SimpleNamespace(saved_tensors=(scores_TE, experts_TK), rule=("softplus", True, 1.0, 1e-20))
    said = []
    for run in (
        lambda: route(scores_TE, None, None, K, softplus, True, 1.0, 1e-20),
        lambda: _Route.backward(context, scores_TE, None, None),
        lambda: weighted_activation(z_NZ, weight_N, ends_E, tanh),
        lambda: weighted_activation_backward(z_NZ, z_NZ, weight_N, ends_E, tanh),
    ):
        try:
            run()
        except CompilationError as error:
            said.append("".join(traceback.format_exception(error)))
    return said


def report(kernel: Any) -> dict[str, int]:
    """Registers and spilled bytes as the assembler tells, and global accesses by how wide they are."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder) / "cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stderr
    counts = {name: sum(map(int, re.findall(rf"(\d+) bytes {name}", log))) for name in ("spill stores", "spill loads")}
    counts["registers"] = int(re.findall(r"Used (\d+) registers", log)[0])
    counts["double precision"] = ptx.count(".f64")
    counts["to nearest bf16"] = ptx.count("cvt.rn.bf16")
    for access in ("ld", "st"):
        found = re.findall(rf"{access}\.global(?:\.v(\d))?\.b(\d+)", ptx)
        for bits in sorted({int(many or 1) * int(each) for many, each in found}):
            counts[f"{access} {bits}"] = sum(int(many or 1) * int(each) == bits for many, each in found)
    return counts


if __name__ == "__main__":
    main()
