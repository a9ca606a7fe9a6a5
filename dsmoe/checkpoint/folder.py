"""The folder of a run's checkpoints: which are there, and which go. No torch.

There is no pointer to the newest one that could lie: it is the whole one of the highest step, by its name.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dsmoe.checkpoint.manifest import DamagedError, Manifest, check_contents, check_files, check_headers
from dsmoe.config.schema import Checkpoint

_NAME = re.compile(r"step_\d+", re.ASCII)
DAMAGED = ".damaged"
"""What is added to the name of a checkpoint that has been passed over."""


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Every folder that has a checkpoint's name, whole or not, oldest first."""
    named = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of)


def inspect(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there, of their sizes. What is in them is not looked at.

    Raises:
        DamagedError: they are not.
    """
    manifest = Manifest.read(checkpoint)
    check_files(checkpoint, manifest)
    if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != manifest.facts.step:
        raise DamagedError(f"{checkpoint} is not what its name says: it is of step {manifest.facts.step}")
    return manifest


def verify(checkpoint: Path) -> Manifest:
    """The manifest of a whole checkpoint; reads all of its files.

    Raises:
        DamagedError: it is not what was written.
    """
    manifest = inspect(checkpoint)
    check_contents(checkpoint, manifest, sorted(manifest.files))
    check_headers(checkpoint, manifest, sorted(manifest.files))
    return manifest


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that has all of its files; `verify` or loading it tells whether they are undamaged."""
    return next(iter(candidates(folder)[0]), None)


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that have all of their files, newest first, and why others were passed over."""
    found, passed_over = _inspected(folder)
    return list(found), passed_over


def _inspected(folder: Path) -> tuple[dict[Path, Manifest], list[str]]:
    """As `candidates`, with their manifests."""
    found, passed_over = {}, []
    for checkpoint in reversed(all_checkpoints(folder)):
        try:
            found[checkpoint] = inspect(checkpoint)
        except DamagedError as error:
            passed_over.append(str(error))
    return found, passed_over


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, where a run goes on because these are damaged; returns their new paths.

    They keep what they have, and nothing takes them for the newest any more.
    """
    aside = []
    for checkpoint in all_checkpoints(folder):
        if step_of(checkpoint) > step:
            target = checkpoint.with_name(checkpoint.name + DAMAGED)
            if target.exists():  # of an earlier time
                shutil.rmtree(target)
            aside.append(checkpoint.rename(target))
    return aside


def remove_old(folder: Path, options: Checkpoint) -> list[Path]:
    """Remove the checkpoints that nothing in `options` keeps, and return them. Call it when a newer one is safe."""
    there = all_checkpoints(folder)
    whole, _ = _inspected(folder)
    kept = set(list(whole)[: options.keep])
    if options.keep_every:
        kept |= {checkpoint for checkpoint in there if step_of(checkpoint) % options.keep_every == 0}
    if options.keep_best:
        losses = {checkpoint: manifest.facts.validation_loss for checkpoint, manifest in whole.items()}
        known = [(loss, step_of(path), path) for path, loss in losses.items() if loss is not None]
        kept |= {path for _, _, path in sorted(known)[: options.keep_best]}
    removed = [checkpoint for checkpoint in there if checkpoint not in kept]
    for checkpoint in removed:
        # Under a name that nothing takes for a checkpoint: removing takes time, and may be interrupted.
        going = checkpoint.with_name(f".{checkpoint.name}.removed")
        checkpoint.rename(going)
        shutil.rmtree(going)
    return removed
