"""Failure reports: each rank's position and stacks, in `failures/<start of the run>/rank_00003.txt`.

A rank writes its report when its own main thread fails, when the watchdog sees that another rank has failed, and on
SIGQUIT, which one rank relays to all and which ends nothing. In a hang, read the rank whose main thread is elsewhere
than the others'. Reports are written by the watchdog's thread or one of this module, so that a main thread that waits
for a device, a disk or a lock is described as well. A crash leaves faulthandler's stacks, and so does SIGABRT, for a
process in which no thread can run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dsmoe.config.errors import describe
from dsmoe.plan.text import rank_names
from dsmoe.runtime.heartbeat import call_with_timeout
from dsmoe.runtime.watchdog import Watchdog

FOLDER = "failures"
KEPT_FOLDERS = 5
WAIT_SECONDS = 5.0
"""The time in which the rank that explains the failure waits for the other reports, due within a heartbeat."""
LAST_COLLECTIVES = 5
DEVICE_SECONDS = 2.0
FILE_SECONDS = 10.0
_POSITION_PREFIX = "stands at: "
_FAULTHANDLER_PREFIXES = ("Fatal Python error: ", "Timeout (")
"""The first words of faulthandler about a crash, and about an interpreter that has stood still."""
_FAULTHANDLER_THREAD = re.compile(r"^(Current thread|Thread) 0x.*\n  File \"(.+)\", line (\d+) in (.+)$", re.M)
_PACKAGE = str(Path(__file__).parents[1])
_START = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}", re.ASCII)
"""The name of the folder of one start of the run."""
GIB = 2**30

logger = logging.getLogger(__name__)


def enable_flight_recorder(folder: Path) -> None:
    """Switch torch's flight recorder on, except where the environment says otherwise; before process groups are made.

    NCCL's watchdog dumps into `folder` at a timeout: `torchfrtrace` reads that.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # torch 2.13's name, and the older
        os.environ.setdefault(name, str(folder.absolute() / "flight_recorder_rank_"))


def make_folder(failures: Path) -> Path:
    """Make the folder of this start of the run, and remove the oldest folders and those without a report.

    A folder that cannot be removed stays. If the new one cannot be made, one among the host's temporary files is.
    """
    with contextlib.suppress(OSError):
        _remove_old(failures)
    try:
        folder = failures / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
        folder.mkdir(parents=True)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="dsmoe_failures_"))
        logger.error("cannot make %s: reports of failures go to %s", describe(error), folder)
    return folder


def _remove_old(failures: Path) -> None:
    old = sorted(path for path in failures.iterdir() if _START.fullmatch(path.name) and path.is_dir())
    for folder in old:
        with contextlib.suppress(OSError):
            for file in folder.iterdir():
                if not file.stat().st_size:
                    file.unlink()
            folder.rmdir()  # where it is empty
    for folder in [path for path in old if path.exists()][: 1 - KEPT_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)


class FailureReports:
    """This rank's reports of one start of the run.

    Args:
        folder: the same on all ranks, of storage that they share.
        watch: this process' watchdog, which has the positions and calls back when another rank has failed.
    """

    def __init__(self, folder: Path, watch: Watchdog) -> None:
        self.folder = folder
        self._watch = watch
        self._file = self._open()
        self._writing = threading.Lock()
        self._has_failed = False

    def _open(self) -> io.FileIO:
        """Open this rank's file, or the null device if that fails."""
        name = f"rank_{self._watch.rank:05d}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # missing if it is one of another host's temporary files
            return (self.folder / name).open("ab", buffering=0)
        except OSError as error:
            logger.error("rank %d has no place for its reports: %s", self._watch.rank, describe(error))
            return Path(os.devnull).open("ab", buffering=0)

    def install(self) -> None:
        """Install the handlers of crashes, SIGQUIT and the watchdog; called by the main thread."""
        faulthandler.enable(self._file)
        faulthandler.unregister(signal.SIGQUIT)
        # A handler that does nothing: because there is one, Python writes the signal's number into the pipe.
        signal.signal(signal.SIGQUIT, lambda *_: None)
        numbers, sending = os.pipe()
        os.set_blocking(sending, False)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        threading.Thread(target=self._report_on_sigquit, args=(numbers,), daemon=True, name="dsmoe reports").start()
        self._watch.reports = self

    def write_failure(self, why: str, error: BaseException | None = None) -> None:
        """Write a report of this rank's first failure; later ones are its consequences, and ignored."""
        if not self._has_failed:
            self._has_failed = True
            self.write(why, error)

    def on_heartbeat(self) -> None:
        """Restart faulthandler's timer: without a heartbeat for the watchdog's timeout, it writes the stacks.

        For a library that keeps Python's lock, in which no thread of Python can write a report.
        """
        faulthandler.dump_traceback_later(self._watch.timeout.total_seconds(), file=self._file)

    def write(self, why: str, error: BaseException | None = None) -> None:
        """Append a report; a full disk, or storage that hangs, must not hide why the run ends."""
        with self._writing:
            try:
                text = self._text(why, error)
            except Exception as problem:
                text = f"{datetime.now():%Y-%m-%d %H:%M:%S}, because {why}; no more is known: {problem!r}\n"
            if call_with_timeout(FILE_SECONDS, lambda: self._file.write(text.encode())) is None:
                print(f"[rank {self._watch.rank}] could not write to {self.folder}", file=sys.stderr, flush=True)

    def gather(self, explanation: str) -> str:
        """Wait up to `WAIT_SECONDS` for the other ranks' reports, and return a summary: ranks grouped by position.

        The explanation and the summary are appended to the log of the run and to `summary.txt`.
        """
        # Of 64 ranks in a hang, 62 stand in the same collective: the odd ones come first.
        #   rank 5: step 7, reading data; read (dsmoe/data/stored.py:88)
        #   rank 9: no report
        #   ranks 0-4, 6-8, 10-63: step 7, layer 3, exchange; all_to_all_single (torch/distributed/...)
        ranks, deadline = self._watch.world_size, time.monotonic() + WAIT_SECONDS
        while len(positions := self._positions()) < ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        by_position: dict[str, list[int]] = {}
        for rank in range(ranks):
            by_position.setdefault(positions.get(rank, "no report"), []).append(rank)
        lines = [f"where each rank stood is in {self.folder} ({len(positions)} of {ranks} have written):"]
        fewest_first = sorted(by_position.items(), key=lambda item: len(item[1]))
        lines += [f"  {rank_names(at_position)}: {position}" for position, at_position in fewest_first]
        text = "\n".join(lines)
        for path in (self.folder / "summary.txt", self.folder.parents[1] / "train.log"):
            with (
                contextlib.suppress(OSError),
                path.open("a", encoding="utf-8") as file,
            ):  # a full disk is not what ended the run
                file.write(f"{explanation}\n{text}\n")
        return text

    def close(self) -> None:
        """Remove the handlers, and this rank's file if it has no report; at an orderly end."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        self._watch.reports = None
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        with contextlib.suppress(OSError):  # it may have been removed
            if os.fstat(self._file.fileno()).st_size or self._file.name == os.devnull:
                return
            Path(os.fsdecode(self._file.name)).unlink()
            self.folder.rmdir()  # if no other rank's files are in it still: the last one removes it
            if self.folder.parent.name == FOLDER:
                self.folder.parent.rmdir()

    def _report_on_sigquit(self, numbers: int) -> None:
        """Read signals' numbers from a pipe; in a thread, since the main one may wait for a device."""
        while received := os.read(numbers, 64):
            if signal.SIGQUIT in received:
                self.write("it was asked to (SIGQUIT)")
                self._watch.request_reports()

    def _text(self, why: str, error: BaseException | None) -> str:
        position, seconds = self._watch.position()
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main = threading.main_thread().ident
        assert main is not None
        stack = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack(frames[main])
        lines = [
            f"=== rank {self._watch.rank} of {self._watch.world_size} on {socket.gethostname()}, process {os.getpid()}",
            f"{datetime.now():%Y-%m-%d %H:%M:%S}, because {why}",
            f"last note:  {position.text} (number {position.count}, {seconds:.1f} s ago)",
            f"{_POSITION_PREFIX}{position.text}; {_innermost(stack)}",
            *_memory(),
            *_collectives(),
        ]
        if error is not None:
            lines += ["", "--- the error", "".join(traceback.format_exception(error)).rstrip()]
        for thread in sorted(frames, key=lambda ident: ident != main):
            name = names.get(thread, str(thread))
            if not name.startswith("dsmoe "):  # the watchdog's threads, and those of this module
                lines += ["", f"--- thread {name}", "".join(traceback.format_stack(frames[thread])).rstrip()]
        return "\n".join(lines) + "\n\n"

    def _positions(self) -> dict[int, str]:
        """The position in each rank's last report, by rank."""
        positions = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob("rank_*.txt"):
                number = path.stem.removeprefix("rank_")
                text = path.read_text(errors="replace", encoding="utf-8")
                if number.isdecimal() and (position := _last_position(text)):
                    positions[int(number)] = position
        return positions


def _last_position(text: str) -> str | None:
    """The position in the last report of a rank's file; None if there is no report."""
    beginnings = "|".join(map(re.escape, (_POSITION_PREFIX, *_FAULTHANDLER_PREFIXES)))
    reports = re.split(rf"^(?=(?:{beginnings}))", text, flags=re.M)
    if len(reports) == 1:
        return None
    last = reports[-1]
    first_line = last.splitlines()[0]
    if last.startswith(_POSITION_PREFIX):
        return first_line.removeprefix(_POSITION_PREFIX)
    # faulthandler calls the thread that crashed the current one; without a crash, the main thread is the last one.
    threads = sorted(_FAULTHANDLER_THREAD.findall(last), key=lambda thread: thread[0] == "Current thread")
    return f"{first_line} {threads[-1][3]} ({_shown(threads[-1][1])}:{threads[-1][2]})" if threads else first_line


def _memory() -> Iterator[str]:
    """The memory of the process, and the device memory of torch's allocator."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    yield f"memory:     {pages * resource.getpagesize() / GIB:.2f} GiB resident, {peak:.2f} at most"
    if torch.cuda.is_initialized():
        # A main thread that waits for the device may hold the allocator's lock.
        yield f"device:     {call_with_timeout(DEVICE_SECONDS, _device_memory) or 'its allocator does not answer'}"


def _device_memory() -> str:
    now, most = torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    return f"{now:.2f} GiB allocated of {torch.cuda.memory_reserved() / GIB:.2f} reserved, {most:.2f} at most"


def _collectives() -> Iterator[str]:
    """The last collectives in torch's flight recorder, where torch has one: the last is the one that waits."""
    entries = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's and NCCL's, each where torch has it
        if dump := getattr(torch._C._distributed_c10d, name, None):
            entries += json.loads(dump()).get("entries", [])
    for entry in sorted(entries, key=lambda entry: entry["time_created_ns"])[-LAST_COLLECTIVES:]:
        yield f"collective: {_collective(entry)}"


def _collective(entry: Mapping[str, Any]) -> str:
    name, description = entry["process_group"]
    group = name if description == "undefined" else f"{name} ({description})"
    ended = "ended" if entry["retired"] else "not ended"
    age = time.time() - entry["time_created_ns"] / 1e9
    return f"{entry['profiling_name']} of {entry['input_sizes']} in group {group}, begun {age:.1f} s ago, {ended}"


def _innermost(stack: traceback.StackSummary) -> str:
    """The innermost line of a stack, and the innermost one in dsmoe."""
    frames = [frame for frame in stack if frame.filename != __file__]
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    shown = [frames[-1]] if not ours or ours[-1] is frames[-1] else [frames[-1], ours[-1]]
    return ", called by ".join(f"{frame.name} ({_shown(frame.filename)}:{frame.lineno})" for frame in shown)


def _shown(file: str) -> str:
    """A file's path relative to the folder of packages."""
    return file.split("/site-packages/")[-1].removeprefix(f"{Path(_PACKAGE).parent}/")
