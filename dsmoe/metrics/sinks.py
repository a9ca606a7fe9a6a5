"""Sinks of metrics: `metrics.jsonl` and TensorBoard."""

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
    """A destination of metrics."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of `step` by name: numbers, and objects such as the text of an evaluation."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """A file of one JSON object per line: `step`, `time` (seconds since 1970) and the metrics.

    Each line opens the file anew, because users move, remove and repair the file during a run.

    Args:
        path: the file, appended to.
        resume_step: the step of the checkpoint that the run resumes from. Lines of later steps are removed, because
            those steps are done again; -1 removes all lines. Lines without metrics are removed too.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_bytes().splitlines()
            steps = [_step_of(line) for line in lines]
            broken = steps[:-1].count(None)  # the end of the run before may have cut the last line
            if broken:
                logger.warning("%s: %d lines that are no metrics are left out", path, broken)
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step]
            write_whole(path, b"".join(line + b"\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line, in one write.

        Raises:
            OSError: the file system does not take the whole line.
        """
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}).encode() + b"\n"
        with self._path.open("ab+", buffering=0) as file:
            if (size := file.seek(0, os.SEEK_END)) > 0:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a full disk has cut the line before
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Do nothing: no file is open between lines."""


class TensorBoard:
    """TensorBoard events of the same numbers under the same names.

    Args:
        folder: the folder of the event files.
        resume_step: the step of the checkpoint that the run resumes from; TensorBoard hides events of later steps.
    """

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
    """Return the step of a line; None for one without metrics: cut off by a crash, or damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
