"""Where metrics go: `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    """Something that keeps metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of `step`."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """One JSON object per logged step: `step`, `time` (seconds since 1970) and the metrics.

    Args:
        path: the file, appended to.
        resume_step: lines of later steps are removed: they are of a run that ended after its last checkpoint, and
            those steps are about to be done again. -1 removes them all.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """The same metrics for TensorBoard, under the same names."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a crash sorts last and so is removed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
