"""Where metrics go: `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from dsmoe.runtime.atomic_files import write_whole

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that keeps metrics."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics of `step`: numbers, and what says of which text an evaluation was."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """One JSON object per logged step: `step`, `time` (seconds since 1970) and the metrics.

    The file is opened for each line, so that one that is moved away, removed or repaired meanwhile is no matter.

    Args:
        path: the file, appended to.
        resume_step: lines of later steps are removed: they are of a run that ended after its last checkpoint, and
            those steps are about to be done again. -1 removes them all. Lines that are no metrics go as well.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines()
            steps = [_step_of(line) for line in lines]
            broken = steps[:-1].count(None)  # the last one may be cut off by the end of the run before
            if broken:
                logger.warning("%s: %d lines that are no metrics are left out", path, broken)
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step]
            write_whole(path, b"".join(line + b"\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}).encode() + b"\n"
        with self._path.open("ab+", buffering=0) as file:
            if (size := file.seek(0, os.SEEK_END)) > 0:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a full disk has cut the one before
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """The same numbers for TensorBoard, under the same names."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one scalar per number."""
        for name, value in metrics.items():
            if isinstance(value, Real):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _step_of(line: bytes) -> float | None:
    """The step of a line; None where it is no line of metrics: cut off by a crash, or damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
