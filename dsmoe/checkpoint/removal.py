"""Remove what a run needs no more, and move what is damaged aside: never as a condition of anything else. No torch.

Only folders with names of our own exact pattern are touched, `.step_00000100.partial` and the like, and checkpoints
that nothing keeps; and in them, only files with names of our own. What cannot be removed (another user's, immutable, a
mount, open on NFS, with a file in it that somebody has put there) is said once and stays.
Only whoever holds the run folder's lock may call what is here.
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
"""What is added to the name of a checkpoint that has been passed over."""
_LEFTOVER = re.compile(r"\.step_\d{8,}(\.[0-9a-f]{8})?\.(partial|replaced|removed)", re.ASCII)
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", re.ASCII)
"""What systems write into folders that somebody looks at, and have no other use for."""
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


def is_others(path: Path) -> bool:
    """Whether somebody else has put this there: no folder, a link, or a folder with files of which none is dsmoe's."""
    if path.is_symlink() or not path.is_dir():
        return True
    names = os.listdir(path)
    return bool(names) and len(_of_others(names)) == len(names)


def _of_others(names: Iterable[str]) -> list[str]:
    return [name for name in names if not (is_own_file(name) or _OF_SYSTEMS.fullmatch(name))]


def _remove_folder(path: Path) -> None:
    """Remove all that is ours and can be removed, and raise the first error of the rest.

    What somebody else has put there may be all that there is of it: only what systems write for themselves goes too.
    """
    errors: list[OSError] = []
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        names = sorted(os.listdir(folder))
        others = _of_others(names)
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

    Stays, besides: what cannot be read now, and what `is_others`.

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
    kept = {*list(found.whole)[: options.keep], *_best(found.whole, options.keep_best)}
    every = options.keep_every
    removed = [
        checkpoint
        for checkpoint in (*found.whole, *found.damaged)
        if checkpoint not in kept and not (every and step_of(checkpoint) % every == 0) and not is_others(checkpoint)
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


def _best(whole: Mapping[Path, Manifest], count: int) -> list[Path]:
    """The `count` of the lowest loss of each text that was evaluated: losses of two texts do not compare."""
    losses: dict[tuple[str, str], list[tuple[float, int, Path]]] = {}
    for path, manifest in whole.items():
        facts = manifest.facts
        if facts.validation_loss is not None and math.isfinite(facts.validation_loss):
            length = str(flatten(facts.config).get("train.sequence_length"))
            losses.setdefault((facts.held_out, length), []).append((facts.validation_loss, step_of(path), path))
    return [path for of_text in losses.values() for _, _, path in sorted(of_text)[:count]]


def discard(path: Path) -> None:
    """Remove what a save that has failed has written, without a word: the failure itself is said."""
    with suppress(OSError):
        _remove_folder(path)
