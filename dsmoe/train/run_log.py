"""Outputs of a run for people: the console, `train.log`, and the sinks of its metrics."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dsmoe.config.errors import describe
from dsmoe.config.schema import Config
from dsmoe.metrics.sinks import JsonLines, Sink, TensorBoard
from dsmoe.runtime.processes import Rank

T = TypeVar("T")

logger = logging.getLogger(__name__)


def log_to_console(rank: Rank) -> None:
    """Log to standard output: everything on rank 0, only errors on the others."""
    logging.raiseExceptions = False  # that a full disk takes no more of the log needs no traceback for each line
    package = logging.getLogger("dsmoe")
    package.setLevel(logging.INFO if rank.is_first else logging.ERROR)
    package.propagate = False
    package.addHandler(_handler(logging.StreamHandler(sys.stdout)))


def log_to_file(folder: Path) -> None:
    """Log to `train.log` of the run folder as well."""
    optional("train.log", lambda: logging.getLogger("dsmoe").addHandler(_handler(LogFile(folder / "train.log"))))


def open_sinks(config: Config, folder: Path, resume_step: int) -> list[Sink]:
    """Open `metrics.jsonl` and TensorBoard; what was written after `resume_step` is dropped."""
    lines = optional("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", resume_step))
    events = None
    if config.observe.tensorboard:
        events = optional("tensorboard", lambda: TensorBoard(folder / "tensorboard", resume_step))
    return [sink for sink in (lines, events) if sink is not None]


def optional(what: str, make: Callable[[], T]) -> T | None:
    """Return what `make` returns, or None and a line in the log where it fails: no report is worth a run."""
    try:
        return make()
    except Exception as error:
        reason = describe(error) if isinstance(error, OSError) else repr(error)
        logger.error("no %s (%s); training goes on without", what, reason)
        return None


class LogFile(logging.handlers.WatchedFileHandler):
    """The run's log, opened again where it was moved or removed; storage that fails loses lines, and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, if that can be done."""
        with suppress(OSError):
            super().emit(record)


def _handler(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
