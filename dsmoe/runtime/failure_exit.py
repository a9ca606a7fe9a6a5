"""How a rank ends that has failed: its exit code, and which of all ranks says why, once for the whole run.

Who speaks where ranks know nothing of each other, `dsmoe.runtime.reporting_rank` says; once they have met, it is the
one that failed first, by `Watch.speaker`.
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
from dsmoe.runtime.missing_ranks import report_at_roll
from dsmoe.runtime.processes import DeviceError, is_shared
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.reporting_rank import LINGER_SECONDS, is_first_of_host, signed, speaks_for_host
from dsmoe.runtime.watchdog import GRACE_SECONDS, process_watch


def ended_by(error: Exception) -> int:
    """Explain the error that ends this rank; returns the exit code.

    That is 2 for what is wrong wherever the ranks run, and 1 for what may not be so at another try or on other hosts.
    """
    if isinstance(error, (UserError, LostRanksError, ExplainedError)):
        text = f"error: {error}"
    elif isinstance(error, OSError):  # where there is a run folder, the traceback is in its failures
        text = f"error: {located(error)}"
    else:
        text = "".join(traceback.format_exception(error))
    explain_end(error, text)
    return exit_code_of(error)


def end_stalled(error: LostRanksError) -> None:
    """End this process from a thread, because the main one waits for a device that waits for ever."""
    explain_end(error, str(error))
    os._exit(FAILED)


def explain_end(error: Exception, text: str) -> None:
    """Print why this process ends, once for the whole run.

    The rank that fails first prints. The others, which then lose their connection to it, only say so: their own
    tracebacks would bury the cause. Where what failed is a collective, because other ranks are not there, it says
    which. Where the store has gone, with rank 0, they cannot agree, and one rank on each host prints. Whoever is not
    the speaker lingers, because launchers end every rank as soon as one has ended.
    """
    rank = Rendezvous.from_environment().rank or 0
    if not dist.is_initialized() or is_shared(error):
        if dist.is_initialized() and (reports := process_watch().reports) and not isinstance(error, UserError):
            reports.of_failure("all ranks have failed alike", error)
        _explain_alone(rank, error, text)
        return
    # A launcher that has seen another rank end asks this one to: not before it has said why.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = process_watch()
    speaker = watch.speaker()
    if watch.reports:
        watch.reports.of_failure("it has failed" if speaker == rank else "a collective failed", error)
    if speaker == rank or (speaker is None and speaks_for_host()):
        why = (watch.explain(error) or text).rstrip()
        explanation = f"[rank {rank}] {why}" if speaker == rank else signed(rank, why)
        print(explanation, file=sys.stderr, flush=True)
        if watch.reports:
            print(watch.reports.gather(explanation), file=sys.stderr, flush=True)
        watch.say_explained()
        if speaker is None:  # while this process is there, nobody else speaks for its host
            time.sleep(LINGER_SECONDS)
        return
    if speaker is not None:
        print(f"[rank {rank}] stopped because rank {speaker} did", file=sys.stderr, flush=True)
    watch.wait_until_explained(LINGER_SECONDS + GRACE_SECONDS)
    time.sleep(LINGER_SECONDS)


def _explain_alone(rank: int, error: Exception, text: str) -> None:
    """Print what ends this rank, where it knows nothing of the others: what ends all of them, once.

    A wrong config is wrong everywhere, and rank 0 says so. What is wrong on a rank alone is told to rank 0, which waits
    for all, and says it. Where rank 0 does not answer, the first rank of a host says what is wrong there, and one rank
    of each what is wrong everywhere, or that rank 0 is missing. Of other errors, only a rank that is still there after
    the launcher would have ended it for rank 0's sake has its own.
    """
    if rank > 0:
        reason = text.removeprefix("error: ").rstrip()
        if not (is_shared(error) or isinstance(error, LostRanksError)) and report_at_roll(reason, exit_code_of(error)):
            return
        first_of_host = is_first_of_host()
        if not (isinstance(error, HostError) and first_of_host):
            time.sleep(LINGER_SECONDS)
        of_rank = isinstance(error, DeviceError) or not isinstance(error, (UserError, LostRanksError))
        of_host = isinstance(error, HostError) and first_of_host
        speaks = not (is_shared(error) or of_rank or isinstance(error, HostError)) and speaks_for_host()
        if is_shared(error) or not (of_host or of_rank or speaks):
            return
        print(signed(rank, text.rstrip()), file=sys.stderr, flush=True)
        if speaks:  # while this process is there, nobody else speaks for its host
            time.sleep(LINGER_SECONDS)
        return
    print(text.rstrip(), file=sys.stderr, flush=True)
