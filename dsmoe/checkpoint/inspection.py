"""Output of `dsmoe checkpoint show` and `verify`. No torch: the tensors' data are not looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.compatibility import rows
from dsmoe.checkpoint.folder import all_checkpoints, candidates, inspect, other_files
from dsmoe.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from dsmoe.config import load_config
from dsmoe.config.dump import flatten
from dsmoe.plan.text import first_and_last, quantity, readable_count, shown, table

logger = logging.getLogger(__name__)

_KINDS = {
    "model": "weights",
    "exp_avg": "mean of the gradients",
    "exp_avg_sq": "mean of their squares",
    "step": "optimizer steps, per parameter",
    "buffer": "buffers of the MoE layers",
    "rng": "random states",
}


def one_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest whole one of the run folder or checkpoint folder at `path`.

    Logs which newer ones are not whole, and why.

    Raises:
        DamagedError: there is no whole checkpoint.
    """
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        found, passed_over = candidates(folder)
        for reason in passed_over:
            logger.warning("passed over: %s", reason)
        if found:
            return found[0]
    raise DamagedError(f"{path} is neither a checkpoint nor a folder with whole ones: there is no {MANIFEST}")


def newest_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint by its name, whole or not: `verify` is to find the damage."""
    named = all_checkpoints(path) or all_checkpoints(path / "checkpoints")
    return named[-1] if named else one_checkpoint(path)


def summary(checkpoint: Path, tensors: bool = False) -> str:
    """Describe a checkpoint in lines: step, layout, size and contents; with `tensors`, each tensor."""
    manifest = inspect(checkpoint)
    facts = manifest.facts
    layout = ", ".join(f"{key} {value}" for key, value in facts.layout.items())
    progress = f"step {facts.step}, {readable_count(facts.tokens)} tokens"
    loss = "" if facts.validation_loss is None else f", validation loss {facts.validation_loss:.4f}"
    size = sum(file.bytes for file in manifest.files.values())
    lines = [
        str(checkpoint),
        f"{progress}, {quantity(facts.skipped_steps, 'skipped step')}{loss}",
        f"run {facts.config['name']}, optimizer {facts.optimizer}; written by {layout}",
        f"with {', '.join(f'{name} {number}' for name, number in facts.versions.items())}",
        f"{quantity(len(manifest.files), 'file')}, {gigabytes(size)}",
        *not_listed(checkpoint, manifest),
    ]
    lines = [*map(shown, lines), "", *table([("what", "tensors", "elements", "size"), *_kinds(manifest)], "<>>>")]
    if tensors:
        entries = [
            (key, t.dtype, "x".join(map(str, t.shape)), str(len(t.chunks))) for key, t in manifest.tensors.items()
        ]
        lines += ["", *table([("tensor", "dtype", "shape", "boxes"), *entries], "<<>>")]
    return "\n".join(lines)


def not_listed(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return a line on files of other people in the folder, if there are any."""
    others = other_files(checkpoint, manifest)
    if not others:
        return []
    what = quantity(len(others), "name")
    shown = ", ".join(first_and_last([repr(name) for name in others]))
    return [f"{what} in the folder that the checkpoint does not list, not read: {shown}"]


def compare(checkpoint: Path, other: Path) -> str:
    """Return the keys in which a checkpoint's config differs from another's, or from a YAML file, as a table."""
    saved = flatten(inspect(checkpoint).facts.config)
    differing = rows(saved, flatten(_config_of(other)))
    if not differing:
        return f"the same config as {other}"
    return "\n".join(table([("key", checkpoint.name, str(other)), *differing], "<<<"))


def gigabytes(size: int) -> str:
    """Format a number of bytes: `1.25 GB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _config_of(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        return inspect(one_checkpoint(path)).facts.config
    return load_config(path).model_dump(mode="json")


def _kinds(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    found = []
    for kind, label in _KINDS.items():
        tensors = [t for key, t in manifest.tensors.items() if key.partition("/")[0] == kind]
        if tensors:
            size = manifest.bytes_of(kind)
            dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors}))
            elements = readable_count(sum(tensor.elements for tensor in tensors))
            found.append((f"{label} ({kind}, {dtypes})", str(len(tensors)), elements, gigabytes(size)))
    return found
