"""Whether the files that a config names, data aside, can be read: for `dsmoe config check`. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from dsmoe.config.errors import Problem
from dsmoe.config.partial_config import UnsoundError
from dsmoe.config.paths import NO_PATHS, may_be_there, unset_in
from dsmoe.config.schema import Config

_CHECKPOINT = re.compile(r"/step_[0-9]+/manifest\.json$")


def input_problems(config: Config) -> list[Problem]:
    """Return which files are missing or cannot be read; those of `data` are for `dsmoe.data.check_sources`."""
    problems: list[Problem] = []
    for check in _CHECKS:
        with suppress(UnsoundError):
            problems.extend(check(config))
    return problems


def _hostfile(config: Config) -> Iterator[Problem]:
    if config.cluster.hostfile is not None:
        yield from _unreadable("cluster.hostfile", config.cluster.hostfile)


def _checkpoints(config: Config) -> Iterator[Problem]:
    for key, path in (
        ("checkpoint.resume", config.checkpoint.resume),
        ("checkpoint.weights_from", config.checkpoint.weights_from),
    ):
        if path is None or path in NO_PATHS.get(key, ()):
            continue
        unreadable = list(_unreadable(key, path))
        yield from unreadable
        folder = Path(path)
        if unreadable or (folder / "manifest.json").is_file():
            continue
        saved = folder / "checkpoints"
        if not saved.is_dir():
            yield key, f"{key}: {path} is neither a checkpoint nor a run's folder"
        elif not may(saved, os.R_OK | os.X_OK):
            yield key, f"{key}: {saved} cannot be read: permission denied"
        elif not any(map(_CHECKPOINT.search, map(str, saved.glob("step_*/manifest.json")))):
            yield key, f"{key} is the folder of a run, {path}, that has no whole checkpoint"


def _unreadable(key: str, path: str) -> Iterator[Problem]:
    if not may_be_there(path):
        yield key, f"{key}: there is no file or folder {path}{unset_in(path)}{where_looked(path)}"
    elif not may(path, os.R_OK):
        yield key, f"{key}: {path} cannot be read: permission denied"


def may(path: str | Path, mode: int) -> bool:
    """Whether this process may use a path so: `os.R_OK`, `os.W_OK`, `os.X_OK`, joined by `|`."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def where_looked(path: str) -> str:
    """For a message: where a path that leads to nothing was looked for; empty for an absolute one."""
    return "" if os.path.isabs(path) else " in this folder, or beside the YAML file"


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (_hostfile, _checkpoints)
