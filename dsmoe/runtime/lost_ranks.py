"""Errors of lost ranks: dsmoe's own, and torch's, recognised by their text and the place where they were raised."""

from __future__ import annotations

import dis
import os
import re
import traceback
from types import TracebackType

import torch.distributed as dist


class LostRanksError(RuntimeError):
    """Ranks that this one waits for are gone or missing."""


_GLOO = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]")
"""The beginning of gloo's own errors: the line in its sources."""
_SAYS_LOST = re.compile(
    r"Application timeout caused pair closure|Connection (closed|reset|refused)|connectFullMesh|(Read|Write) error|"
    r"Broken pipe|No route to host|unreachable|[Tt]imed out|Watchdog|aborted|ncclRemoteError|recvValue|sendBytes"
)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def is_lost_rank_error(error: BaseException) -> bool:
    """Return whether an error is a collective's, or the store's, that has lost other ranks.

    A disk or a download can say `timed out` as well. So the place where the error was raised counts: in torch's
    collectives, or in the wait for one. Errors about a collective's arguments are not of lost ranks.
    """
    if isinstance(error, (LostRanksError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or not _SAYS_LOST.search(text):
        return False
    return bool(_GLOO.match(text)) or isinstance(error, dist.DistBackendError) or _is_of_collective(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without the line in gloo's sources and gloo's guess at the cause."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).split(". This is typically")[0]
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def _is_of_collective(error: BaseException) -> bool:
    """Return whether torch's C++ raised the error while Python was in torch's collectives, or in `dist.Work.wait`."""
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
    """Return whether the error comes from a `raise` statement; C++ raises at a call."""
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
