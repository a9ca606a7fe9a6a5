"""Exit of a failed rank: its exit code, and the choice of the one rank that explains the failure.

Once the ranks have joined, that is the first failed rank (`Watchdog.announce_failure`); before, the choice is made by
`dsmoe.runtime.reporting_rank`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

from dsmoe.config.errors import ExplainedError, HostError, UserError, exit_code_of, located
from dsmoe.exit_codes import FAILED
from dsmoe.runtime.lost_ranks import LostRanksError
from dsmoe.runtime.processes import DeviceError, is_shared
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.rendezvous_barrier import report_to_rank_0
from dsmoe.runtime.reporting_rank import LINGER_SECONDS, is_host_leader, reports_for_host, signed
from dsmoe.runtime.watchdog import GRACE_SECONDS, process_watchdog


def report_failure(error: Exception) -> int:
    """Print the error that ends this rank, once for all ranks, and return the exit code.

    That is 2 for an error that is the same wherever the ranks run, 1 for one that another try or host may not have.
    """
    if isinstance(error, (UserError, LostRanksError, ExplainedError)):
        text = f"error: {error}"
    elif isinstance(error, OSError):  # the traceback is in the failure reports, if there is a run folder
        text = f"error: {located(error)}"
    else:
        text = "".join(traceback.format_exception(error))
    print_failure(error, text)
    return exit_code_of(error)


def exit_stalled(error: LostRanksError) -> None:
    """Print the error and end this process; for a thread, while the main one waits for a device that never answers."""
    print_failure(error, str(error))
    os._exit(FAILED)


def print_failure(error: Exception, text: str) -> None:
    """Print why this process ends, once for the whole run.

    The first failed rank prints. The others, which then lose their connection to it, print one line: their tracebacks
    would bury the cause. If the failure is a collective's, because other ranks are gone, the missing ranks are named.
    If the store has gone, with rank 0, no first failed rank can be agreed on, and one rank on each host prints. The
    other ranks linger, because launchers end all ranks as soon as one has ended.
    """
    rank = Rendezvous.from_environment().rank or 0
    if not dist.is_initialized() or is_shared(error):
        if dist.is_initialized() and (reports := process_watchdog().reports) and not isinstance(error, UserError):
            reports.write_failure("all ranks have failed alike", error)
        _print_unjoined(rank, error, text)
        return
    # A launcher that has seen another rank end sends SIGTERM to this one, which first has to print.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = process_watchdog()
    first_failed = watch.announce_failure()
    if watch.reports:
        watch.reports.write_failure("it has failed" if first_failed == rank else "a collective failed", error)
    if first_failed == rank or (first_failed is None and reports_for_host()):
        why = (watch.explain(error) or text).rstrip()
        explanation = f"[rank {rank}] {why}" if first_failed == rank else signed(rank, why)
        print(explanation, file=sys.stderr, flush=True)
        if watch.reports:
            print(watch.reports.gather(explanation), file=sys.stderr, flush=True)
        watch.announce_explained()
        if first_failed is None:  # while this process is alive, no other rank of its host prints
            time.sleep(LINGER_SECONDS)
        return
    if first_failed is not None:
        print(f"[rank {rank}] stopped because rank {first_failed} did", file=sys.stderr, flush=True)
    watch.wait_until_explained(LINGER_SECONDS + GRACE_SECONDS)
    time.sleep(LINGER_SECONDS)


def _print_unjoined(rank: int, error: Exception, text: str) -> None:
    """Print why this rank ends before the ranks have joined, once for an error that all ranks have.

    Who prints which error:
        on all ranks, such as a wrong config       rank 0
        on another rank alone                      rank 0, which waits for all ranks and is told (`report_to_rank_0`)
        the same, and rank 0 does not answer:
            of the host (HostError)                the leader of the host
            of the rank (its device, a traceback)  the rank, if the launcher has not ended it by then, as it does if
                                                   rank 0 has the same error
            of all ranks, or rank 0 is missing     one rank of each host
    """
    if rank > 0:
        reason = text.removeprefix("error: ").rstrip()
        if not (is_shared(error) or isinstance(error, LostRanksError)) and report_to_rank_0(
            reason, exit_code_of(error)
        ):
            return
        is_leader = is_host_leader()
        if not (isinstance(error, HostError) and is_leader):
            time.sleep(LINGER_SECONDS)
        is_of_rank = isinstance(error, DeviceError) or not isinstance(error, (UserError, LostRanksError))
        is_of_host = isinstance(error, HostError) and is_leader
        for_host = not (is_shared(error) or is_of_rank or isinstance(error, HostError)) and reports_for_host()
        if is_shared(error) or not (is_of_host or is_of_rank or for_host):
            return
        print(signed(rank, text.rstrip()), file=sys.stderr, flush=True)
        if for_host:  # while this process is alive, no other rank of its host prints
            time.sleep(LINGER_SECONDS)
        return
    print(text.rstrip(), file=sys.stderr, flush=True)
