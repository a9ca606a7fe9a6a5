"""The kernels' block sizes: measured ones where `blocks.json` has the device's compute capability, else the default.

`python -m benchmarks.gpu.tune` measures them. They are chosen once, when the first kernel is imported, for the device
that is then the current one.

Most results have the same bits whatever the sizes. Sums within a program are added in an order that depends on them:
the router weight's gradient (`activation_backward`), and the softmax, the normalised weights and their gradients
(`topk_router`). These repeat themselves bit for bit as long as the sizes stay; another capability or a newly adopted
table changes them by a rounding of fp32.
"""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("blocks.json")

Sizes = dict[str, int]
Table = dict[str, dict[str, dict[str, Any]]]
"""Capability (`default` or as `sm_90`), kernel, and `sizes`; measured ones also have `device` and `date`."""

KERNELS = {
    "activation_backward": ("tile", "columns", "warps"),
    "activation_forward": ("tile", "columns", "warps"),
    "bag_sum": ("columns", "columns_per_warp", "unroll"),
    "permute": ("block", "warps"),
    "topk_router": ("tile", "warps"),
}
"""The sizes of each kernel, all powers of two.

`tile`: elements that a program works on at a time, of which `columns` are side by side, but no more than there are.
`warps`: groups of 32 threads per program. `unroll`: rows of a bag that are loaded at a time. `block`: assignments per
program; ranks cost its square, histograms cost E per block; not below 32 per warp, where threads would have copies.

The default gives a thread one 16-byte vector per row in `bag_sum`, two per tensor of bf16 in the activation, and four
per tensor of fp32 in the router.
"""


def read(path: Path) -> Table:
    """The table of a file.

    Raises:
        ValueError: it is malformed; the message names the file, the key and what to do.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the file from the repository") from None
    check(table, path)
    return table


def check(table: Any, path: Path) -> None:
    """Refuse a malformed table; `path` is for the message.

    Raises:
        ValueError: as `read`.
    """
    _expect_keys(table, "", ["default"], path, optional=r"sm_\d+")
    _expect_keys(table["default"], "default", list(KERNELS), path)
    for capability, kernels in table.items():
        _expect_keys(kernels, capability, [], path, optional="|".join(KERNELS))
        for kernel, entry in kernels.items():
            place = f"{capability}.{kernel}"
            _expect_keys(entry, place, ["sizes", *(("date", "device") if capability != "default" else ())], path)
            _expect_keys(entry["sizes"], f"{place}.sizes", list(KERNELS[kernel]), path)
            for name, size in entry["sizes"].items():
                most = 32 if name == "warps" else 2**16
                if type(size) is not int or not 1 <= size <= most or size & (size - 1):
                    raise ValueError(f"{path}: {place}.sizes.{name}: {size!r}; must be a power of two from 1 to {most}")


def capability() -> str:
    """The current device's compute capability, such as `sm_90`; `cpu` without one, and in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.cuda is None or not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def choose(table: Table, capability: str) -> dict[str, Sizes]:
    """Each kernel's sizes on devices of a capability."""
    chosen = {**table["default"], **table.get(capability, {})}
    return {kernel: entry["sizes"] for kernel, entry in chosen.items()}


def _expect_keys(value: Any, place: str, required: list[str], path: Path, optional: str = "") -> None:
    """Refuse anything but an object with the required keys and, beyond them, keys that match `optional`."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {place or 'the file'}: {value!r}; must be an object in braces")
    prefix = f"{place}." if place else ""
    for key in value:
        if key not in required and not (optional and re.fullmatch(optional, key)):
            known = [*required, *("sm_90" if "sm_" in optional else optional).split("|")] if optional else required
            guess = get_close_matches(key, known, 1, 0.6)
            allowed = f"did you mean {guess[0]!r}?" if guess else f"expected {' or '.join(known)}"
            raise ValueError(f"{path}: {prefix}{key}: unknown key; {allowed}")
    for key in required:
        if key not in value:
            raise ValueError(f"{path}: {prefix}{key}: missing; add it, or restore the file from the repository")


SIZES = choose(read(TABLE), capability())
"""The kernels' sizes on the current device, looked up at every call."""
