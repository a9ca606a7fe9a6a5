"""Headers of safetensors files: the types, shapes and places of their tensors. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dsmoe.runtime.atomic_files import check_regular

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Size of an element by the dtype's name in safetensors files."""
FLOATS = ("F64", "F32", "BF16", "F16")
"""The types that weights may have."""
LARGEST = 1 << 63
"""Bound of sizes, numbers of elements and offsets; a product of unbounded ones would take for ever."""
MOST_DIMENSIONS = 32
_LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library: a longer one is no header."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In bytes, from the beginning of the file."""


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name; reads the header alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a whole safetensors file; with the reason.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("it ends within its header")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, entry, 8 + length, size) for name, entry in header.items()}
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none: {error}") from None
    # The tensors must fill the rest of the file without a gap or an overlap. One without elements shares its offset
    # with the next: the smaller first.
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, prod(entry.shape))):
        if entry.offset != end:
            raise ValueError("its tensors do not stand one after the other")
        end += prod(entry.shape) * BYTES[entry.dtype]
    if end != size:
        raise ValueError(f"it has {size:,} bytes, and its header describes {end:,}")
    return entries


def are_sizes(values: object, least: int = 0) -> bool:
    """Return whether a value of JSON is a list of whole numbers from `least` on, as a shape is."""
    return (
        type(values) is list
        and len(values) <= MOST_DIMENSIONS
        and all(type(value) is int and least <= value < LARGEST for value in values)
    )


def _entry(path: Path, entry: dict[str, Any], start: int, size: int) -> TensorEntry:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BYTES:
        raise ValueError(f"it has elements of type {dtype}, which is none of {', '.join(BYTES)}")
    if not (are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2):
        raise ValueError("its header contradicts itself")
    first, last = offsets
    if last - first != prod(shape) * BYTES[dtype]:
        raise ValueError("its header contradicts itself")
    if start + last > size:
        raise ValueError(f"it has {size:,} bytes, and its header describes {start + last:,} or more")
    return TensorEntry(path, dtype, tuple(shape), start + first)


# Of two equal names JSON's last would count here, and another reader might take the first.
def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found
