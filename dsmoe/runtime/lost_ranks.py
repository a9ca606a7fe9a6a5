"""Which errors mean that other ranks are not there; told by where they were raised, and what they say."""

from __future__ import annotations

import dis
import os
import re
import traceback
from types import TracebackType

import torch.distributed as dist


class LostRanksError(RuntimeError):
    """Ranks that this one waits for do not come."""


_GLOO = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]")
"""How gloo's own errors begin: with the place in its sources."""
_SAYS_LOST = re.compile(
    r"Application timeout caused pair closure|Connection (closed|reset|refused)|connectFullMesh|(Read|Write) error|"
    r"Broken pipe|No route to host|unreachable|[Tt]imed out|Watchdog|aborted|ncclRemoteError|recvValue|sendBytes"
)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def is_lost(error: BaseException) -> bool:
    """Whether an error is what a collective, or the store, raises when other ranks are not there.

    Others say `timed out` as well: a disk, a download. So it counts where an error was raised: in torch's collectives,
    or where one is waited for. What a collective says of its arguments is not this.
    """
    if isinstance(error, (LostRanksError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or not _SAYS_LOST.search(text):
        return False
    return bool(_GLOO.match(text)) or isinstance(error, dist.DistBackendError) or _is_of_collective(error)


def first_line(error: BaseException) -> str:
    """What the error says, without the place in its sources and what gloo supposes to have caused it."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).split(". This is typically")[0]
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def _is_of_collective(error: BaseException) -> bool:
    """Whether torch's C++ raised it while Python was in torch's collectives, or called `wait` (of `dist.Work`)."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    if _is_raised_by_python(last):
        return False
    (frame,) = traceback.extract_tb(last)
    return frame.filename.endswith(_COLLECTIVES) or "wait(" in (frame.line or "")


def _is_raised_by_python(place: TracebackType) -> bool:
    """Whether a `raise` stands there; C++ raises where Python calls it."""
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
