"""Facts of this machine, as JSON on standard output: `python -m benchmarks.gpu.machine DEVICE ARGUMENT ...`.

A process of its own, because a process that asks a CUDA device for its name takes half a gibibyte of its memory.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from benchmarks.measuring import circumstances, first_line
from dsmoe.plan.devices import known_device
from dsmoe.train.environment import git_commit

REHEARSED_RANKS = 2
"""Ranks on a CPU: enough that tokens travel."""
MOST_RANKS = 8
"""As many as the small model has experts; its degrees are powers of two."""


def describe(device: str, arguments: list[str]) -> dict[str, Any]:
    """The circumstances, the number of devices, how many ranks they make, and what the planner calls them."""
    devices = torch.cuda.device_count() if device == "cuda" else 1
    usable = devices if device == "cuda" else REHEARSED_RANKS
    ranks = min(1 << (usable.bit_length() - 1), MOST_RANKS)
    facts = circumstances(["python", "-m", "benchmarks.gpu", *arguments], device, os.cpu_count() or 1)
    known_as = known_device(facts["hardware"]) if device == "cuda" else "cpu"
    return {**facts, "commit": git_commit(), "device": device, "devices": devices, "ranks": ranks, "known_as": known_as}


def why_not(device: str) -> str | None:
    """Why nothing can be measured here: no device, or Triton cannot make what every kernel needs."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here; `--device cpu --tiny` rehearses without one"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles a module of C once, and keeps it in its cache
    except Exception as error:
        return (
            f"Triton cannot compile its driver module ({first_line(error)}): it needs a C compiler (gcc, or what CC "
            f"names), Python's headers and a writable TRITON_CACHE_DIR"
        )
    return None


if __name__ == "__main__":
    if reason := why_not(sys.argv[1]):
        sys.exit(f"error: {reason}")
    print(json.dumps(describe(sys.argv[1], sys.argv[2:])))
