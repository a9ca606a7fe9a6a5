"""Remove what a run needs no more, and move what is damaged aside: never as a condition of anything else. No torch.

Only folders with names of our own exact pattern are touched, `.step_00000100.partial` and the like, and checkpoints
that nothing keeps. What cannot be removed (another user's, immutable, a mount, open on NFS) is said once and stays.
Only whoever holds the run folder's lock may call what is here.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dsmoe.checkpoint.folder import look, step_of
from dsmoe.config.errors import describe
from dsmoe.config.schema import Checkpoint

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""What is added to the name of a checkpoint that has been passed over."""
_LEFTOVER = re.compile(r"\.step_\d{8,}(\.[0-9a-f]{8})?\.(partial|replaced|removed)", re.ASCII)
_said: set[Path] = set()
"""What could not be removed, of which the log has been told."""


def hidden_name(checkpoint: Path, suffix: str) -> Path:
    """`.step_00000100.partial` beside a checkpoint, or `.step_00000100.1c9e02ab.partial` where that name is taken."""
    path = checkpoint.with_name(f".{checkpoint.name}.{suffix}")
    if os.path.lexists(path):
        path = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.{suffix}")
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that did not come to an end have left, as far as that is possible."""
    try:
        names = [entry.name for entry in os.scandir(folder) if _LEFTOVER.fullmatch(entry.name)]
    except OSError:
        return  # there is no such folder yet, or saving will find out what is wrong with it
    for name in sorted(names):
        remove(folder / name)


def remove(path: Path) -> None:
    """Remove a folder, or a link but nothing that it points to; where that cannot be done, say so once."""
    try:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():  # we make no files of such names
            _remove_folder(path)
    except OSError as error:
        if path not in _said:
            _said.add(path)
            logger.warning(
                "cannot remove %s (%s); it stays, and takes its room on the disk until somebody removes it",
                *(path, describe(error)),
            )


def _remove_folder(path: Path) -> None:
    """Remove all of it that can be removed, and raise the first error of the rest."""
    errors: list[OSError] = []
    shutil.rmtree(path, onerror=lambda *problem: errors.append(problem[2][1]))
    serious = [error for error in errors if not isinstance(error, FileNotFoundError)]
    if serious:
        raise serious[0]


def set_aside(checkpoints: Iterable[Path]) -> list[Path]:
    """Rename damaged checkpoints, where a run goes on from an earlier one; returns their new paths.

    They keep what they have, and nothing takes them for the newest any more. One that cannot be renamed is said.
    """
    aside = []
    for checkpoint in checkpoints:
        target = checkpoint.with_name(checkpoint.name + DAMAGED)
        if target.is_dir():  # of an earlier time
            remove(target)
        if os.path.lexists(target):
            target = checkpoint.with_name(f"{checkpoint.name}.{secrets.token_hex(4)}{DAMAGED}")
        try:
            aside.append(checkpoint.rename(target))
        except OSError as error:
            logger.error("cannot rename %s, which is damaged, to %s: %s", checkpoint, target.name, error.strerror)
    return aside


def remove_old(folder: Path, options: Checkpoint, saved: Path | None = None) -> list[Path]:
    """Remove the checkpoints that nothing in `options` keeps, and return them. Call it when a newer one is safe.

    Stays, besides: what cannot be read now, and links, which somebody has put there.

    Args:
        folder: where they are.
        options: what stays.
        saved: the newest, which this run has just written: unless it is seen to be whole, nothing is removed.
    """
    found = look(folder)
    if saved is not None and saved not in found.whole:
        why = found.passed_over.get(saved, "it is not there")
        logger.error("%s was saved and does not look whole (%s); older checkpoints stay", saved, why)
        return []
    kept = set(list(found.whole)[: options.keep])
    if options.keep_best:
        # Of the text that the newest was evaluated on: losses on another do not compare.
        facts = {checkpoint: manifest.facts for checkpoint, manifest in found.whole.items()}
        text = next((fact.held_out for fact in facts.values() if fact.validation_loss is not None), "")
        losses = {path: fact.validation_loss for path, fact in facts.items() if fact.held_out == text}
        known = [
            (loss, step_of(path), path) for path, loss in losses.items() if loss is not None and math.isfinite(loss)
        ]
        kept |= {path for _, _, path in sorted(known)[: options.keep_best]}
    every = options.keep_every
    removed = [
        checkpoint
        for checkpoint in (*found.whole, *found.damaged)
        if checkpoint not in kept and not (every and step_of(checkpoint) % every == 0) and not checkpoint.is_symlink()
    ]
    for checkpoint in sorted(removed, key=step_of):
        # Under a name that nothing takes for a checkpoint: removing takes time, and may be interrupted.
        going = hidden_name(checkpoint, "removed")
        try:
            checkpoint.rename(going)
        except OSError as error:
            if checkpoint not in _said:
                _said.add(checkpoint)
                logger.warning("cannot remove %s, which is kept no more: %s", checkpoint, error.strerror)
            continue
        remove(going)
    return removed


def discard(path: Path) -> None:
    """Remove what a save that has failed has written, without a word: the failure itself is said."""
    with suppress(OSError):
        _remove_folder(path)
