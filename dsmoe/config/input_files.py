"""Checks that the files a config names, except data, can be read: for `dsmoe config check`. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from dsmoe.config.errors import Problem
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.paths import PATH_KEYWORDS, may_exist, unset_variables_note
from dsmoe.config.schema import Config

_CHECKPOINT = re.compile(r"/step_[0-9]+/manifest\.json$")


def input_problems(config: Config) -> list[Problem]:
    """Return a problem for each missing or unreadable file; files of `data` are left to `dsmoe.data.check_sources`."""
    problems: list[Problem] = []
    for check in _CHECKS:
        with suppress(InvalidKeyError):
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
        if path is None or path in PATH_KEYWORDS.get(key, ()):
            continue
        unreadable = list(_unreadable(key, path))
        yield from unreadable
        folder = Path(path)
        if unreadable or (folder / "manifest.json").is_file():
            continue
        saved = folder / "checkpoints"
        if not saved.is_dir():
            yield key, f"{key}: {path} is neither a checkpoint nor a run's folder"
        elif not may_access(saved, os.R_OK | os.X_OK):
            yield key, f"{key}: {saved} cannot be read: permission denied"
        elif not any(map(_CHECKPOINT.search, map(str, saved.glob("step_*/manifest.json")))):
            yield key, f"{key} is the folder of a run, {path}, that has no whole checkpoint"


def _unreadable(key: str, path: str) -> Iterator[Problem]:
    if not may_exist(path):
        yield key, f"{key}: there is no file or folder {path}{unset_variables_note(path)}{where_searched(path)}"
    elif not may_access(path, os.R_OK):
        yield key, f"{key}: {path} cannot be read: permission denied"


def may_access(path: str | Path, mode: int) -> bool:
    """Return whether this process has access of `mode` to a path: `os.R_OK`, `os.W_OK`, `os.X_OK`, joined by `|`."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def where_searched(path: str) -> str:
    """Return the end of a message on a missing path: where a relative one was searched; empty for an absolute one."""
    return "" if os.path.isabs(path) else " in this folder, or beside the YAML file"


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (_hostfile, _checkpoints)
