"""What goes wrong with saves: the errors, and what is said when no new checkpoint comes for long."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.config.errors import UserError, describe, exit_code_of
from dsmoe.plan.text import quantity


class SaveError(UserError):
    """A checkpoint could not be written; the earlier ones are untouched."""

    is_of_disk = False
    """Whether it was the disk that would not have it, which may at another try."""

    @classmethod
    def of(cls, final: Path, error: CheckpointException) -> SaveError:
        """What went wrong where, without torch's tracebacks if it is the disk."""
        rank, (cause, _) = min(error.failures.items())
        where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
        reason = f"{describe(cause)}{where}" if isinstance(cause, OSError) else str(error)
        failure = cls(f"cannot save {final}: {reason}; the earlier checkpoints are there")
        failure.is_of_disk, failure.exit_code = isinstance(cause, OSError), exit_code_of(cause)
        return failure


class NotFiniteError(DamagedError):
    """A checkpoint whose files are as they were written, and whose state is no model any more: NaN or infinite."""


@dataclass
class Misses:
    """The saves in a row that were due and have given no checkpoint."""

    last: str = "the beginning"
    """What would be gone on from after a crash."""
    since: float = field(default_factory=time.time)
    """Since when that is so."""
    failed: int = 0
    put_off: int = 0
    """Because steps were skipped."""

    def saved(self, step: int) -> None:
        """There is a checkpoint again."""
        self.last, self.since, self.failed, self.put_off = f"step {step}", time.time(), 0, 0

    def warning(self) -> str:
        """What the log says besides, from the second in a row on; else nothing."""
        if self.failed + self.put_off < 2:
            return ""
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        put_off = f"{quantity(self.put_off, 'save')} in a row put off while steps were skipped"
        failed = f"{self.failed} saves in a row have failed" if self.failed else ""
        what = " and ".join(part for part in (failed, put_off if self.put_off else "") if part)
        return (
            f". NO NEW CHECKPOINT SINCE {self.last.upper()} ({begun}): {what}, and what "
            f"was trained since then is lost if the run ends now"
        )
