"""What all launchers have in common: what is asked for, and what is written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config.schema import Config


@dataclass(frozen=True)
class Request:
    """A run that is to be started: its config, and what was typed to name it."""

    config: Config
    path: str
    """The YAML file, as it was typed."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as typed; part of `config` already."""

    @property
    def arguments(self) -> str:
        """What follows `launch/pretrain.py` on a shell's command line."""
        return shlex.join(["--config", self.path, *self.overrides])


@dataclass(frozen=True)
class Job:
    """Files that start a run with one launcher, and the command to type when they are there."""

    files: Mapping[str, str]
    """Text by file name, in one folder."""
    command: str
    """To be typed in the folder from which `dsmoe launch` was run."""
    executable: frozenset[str] = field(default=frozenset())
    """The files that are run by their name."""

    def write(self, folder: Path) -> list[Path]:
        """Write the files, whole or not at all each; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, text in self.files.items():
            path = folder / name
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text)
            temporary.chmod(0o755 if name in self.executable else 0o644)
            temporary.replace(path)
            paths.append(path)
        return paths
