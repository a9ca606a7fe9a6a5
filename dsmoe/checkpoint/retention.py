"""Retention: remove old checkpoints and leftovers of saves, and set damaged checkpoints aside. No torch.

Nothing else depends on a removal. Only folders with names of dsmoe's exact pattern, `.step_00000100.partial` and the
like, and checkpoints that nothing keeps are touched; and in them, only files with names of dsmoe's. What cannot be
removed (another user's, immutable, a mount, open on NFS, with a file of somebody's in it) is logged once and stays.
Only the holder of the run folder's lock may call these functions.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from dsmoe.checkpoint.folder import look, step_of
from dsmoe.checkpoint.manifest import Manifest, is_own_file
from dsmoe.config.dump import flatten
from dsmoe.config.errors import describe
from dsmoe.config.schema import Checkpoint
from dsmoe.plan.text import first_and_last

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Added to the name of a checkpoint that has been passed over."""
_LEFTOVER = re.compile(r"\.step_\d{8,}(\.[0-9a-f]{8})?\.(partial|replaced|removed)", re.ASCII)
_SYSTEM_FILES = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", re.ASCII)
"""Files that desktops write into a folder when somebody opens it."""
_logged: set[Path] = set()
"""Paths that could not be removed, as the log says already."""


def hidden_name(checkpoint: Path, suffix: str) -> Path:
    """Return `.step_00000100.partial` beside a checkpoint; `.step_00000100.1c9e02ab.partial` where that is taken."""
    path = checkpoint.with_name(f".{checkpoint.name}.{suffix}")
    if os.path.lexists(path):
        path = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.{suffix}")
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and removals have left, as far as possible."""
    try:
        names = [entry.name for entry in os.scandir(folder) if _LEFTOVER.fullmatch(entry.name)]
    except OSError:
        return  # no such folder yet, or one whose fault saving will report
    for name in sorted(names):
        remove(folder / name)


def remove(path: Path) -> None:
    """Remove a folder, or a link but not its target; log once where that cannot be done."""
    try:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():  # dsmoe makes no files of such names
            _remove_folder(path)
    except OSError as error:
        if path not in _logged:
            _logged.add(path)
            logger.warning(
                "cannot remove %s (%s); it stays, and takes its room on the disk until somebody removes it",
                *(path, describe(error)),
            )


def is_others(path: Path) -> bool:
    """Return whether somebody else made this: no folder, a link, or a folder with files none of which is dsmoe's."""
    if path.is_symlink() or not path.is_dir():
        return True
    names = os.listdir(path)
    return bool(names) and len(_others_files(names)) == len(names)


def _others_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if not (is_own_file(name) or _SYSTEM_FILES.fullmatch(name))]


def _remove_folder(path: Path) -> None:
    """Remove all files of dsmoe's that can be removed, and raise the first error of the rest.

    Files of other people stay, since there may be no other copy; those that desktops write are removed too.
    """
    errors: list[OSError] = []
    # By descriptor and without following links: should another process replace the folder by a link meanwhile, nothing
    # behind the link is removed.
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        names = sorted(os.listdir(folder))
        others = _others_files(names)
        for name in sorted(set(names) - set(others)):
            try:
                os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            except OSError as error:  # a folder of such a name, for one
                errors.append(OSError(error.errno, error.strerror, str(path / name)))
    finally:
        os.close(folder)
    if errors:
        raise errors[0]
    if others:
        shown = ", ".join(first_and_last([repr(name) for name in others]))
        raise OSError(errno.ENOTEMPTY, f"it has something that is not dsmoe's: {shown}")
    os.rmdir(path)


def set_aside(checkpoints: Iterable[Path]) -> list[Path]:
    """Rename damaged checkpoints, where a run resumes from an earlier one, and return their new paths.

    Their files stay, and nothing takes them for the newest any more. One that cannot be renamed is logged.
    """
    aside = []
    for checkpoint in checkpoints:
        target = checkpoint.with_name(checkpoint.name + DAMAGED)
        if target.is_dir():  # set aside at an earlier start
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

    Checkpoints that cannot be read now stay, and what `is_others`.

    Args:
        folder: of the run's checkpoints.
        options: section `checkpoint`.
        saved: the newest, which this run has just written: unless it is seen to be whole, nothing is removed.
    """
    found = look(folder)
    if saved is not None and saved not in found.whole:
        why = found.passed_over.get(saved, "it is not there")
        logger.error("%s was saved and does not look whole (%s); older checkpoints stay", saved, why)
        return []
    # A union: a checkpoint stays if any of the options keeps it.
    kept = {*list(found.whole)[: options.keep], *_best(found.whole, options.keep_best)}
    every = options.keep_every
    removed = [
        checkpoint
        for checkpoint in (*found.whole, *found.damaged)
        if checkpoint not in kept and not (every and step_of(checkpoint) % every == 0) and not is_others(checkpoint)
    ]
    for checkpoint in sorted(removed, key=step_of):
        # First renamed to what nothing takes for a checkpoint: removing takes time, and may be interrupted.
        going = hidden_name(checkpoint, "removed")
        try:
            checkpoint.rename(going)
        except OSError as error:
            if checkpoint not in _logged:
                _logged.add(checkpoint)
                logger.warning("cannot remove %s, which is kept no more: %s", checkpoint, error.strerror)
            continue
        remove(going)
    return removed


def _best(whole: Mapping[Path, Manifest], count: int) -> list[Path]:
    """Return the `count` checkpoints of the lowest loss, of each text: losses of two texts do not compare."""
    losses: dict[tuple[str, str], list[tuple[float, int, Path]]] = {}
    for path, manifest in whole.items():
        facts = manifest.facts
        if facts.validation_loss is not None and math.isfinite(facts.validation_loss):
            length = str(flatten(facts.config).get("train.sequence_length"))
            losses.setdefault((facts.held_out, length), []).append((facts.validation_loss, step_of(path), path))
    return [path for losses_of_text in losses.values() for _, _, path in sorted(losses_of_text)[:count]]


def discard(path: Path) -> None:
    """Remove what a failed save has written; logs nothing, as the failure itself is logged."""
    with suppress(OSError):
        _remove_folder(path)
