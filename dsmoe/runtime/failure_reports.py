"""Where every rank stands when the run fails, hangs, or is asked: `failures/<start of the run>/rank_00003.txt`.

A rank writes its report when its own main thread fails, when the watch sees that another's has, and on SIGQUIT, which
one rank hands on to all and which ends nothing. The rank that hangs is the one to read: its main thread is somewhere
else than the others'. Reports are written by the watch's thread or one of their own, so that a main thread that waits
for a device, a disk or a lock is described as well. A crash leaves the bare stacks, and so does SIGABRT, which is left
where not even a thread can run.
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
from dsmoe.runtime.heartbeat import within
from dsmoe.runtime.watchdog import Watch

FOLDER = "failures"
KEPT_FOLDERS = 5
WAIT_SECONDS = 5.0
"""How long the rank that speaks waits for the others' reports, which come within a beat of the watch."""
LAST_COLLECTIVES = 5
DEVICE_SECONDS = 2.0
FILE_SECONDS = 10.0
_STANDS = "stands at: "
_BARE = ("Fatal Python error: ", "Timeout (")
"""How faulthandler begins to write of a crash, and of an interpreter that has stood still."""
_BARE_THREAD = re.compile(r"^(Current thread|Thread) 0x.*\n  File \"(.+)\", line (\d+) in (.+)$", re.M)
_PACKAGE = str(Path(__file__).parents[1])
_START = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}", re.ASCII)
"""The name of the folder of one start."""
GIB = 2**30

logger = logging.getLogger(__name__)


def record_collectives(folder: Path) -> None:
    """Switch torch's flight recorder on, whatever the environment has set apart; before process groups are made.

    What NCCL's watchdog dumps at a timeout goes to `folder`: `torchfrtrace` reads it.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # torch 2.13's name, and the older
        os.environ.setdefault(name, str(folder.absolute() / "flight_recorder_rank_"))


def make_folder(failures: Path) -> Path:
    """Make the folder of this start of the run, and remove the oldest ones and those without a report.

    What cannot be removed stays. Where the folder cannot be made, another is, for this host's temporary files.
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


class Reports:
    """This rank's reports of one start of the run.

    Args:
        folder: the same on all ranks, of storage that they share.
        watch: what this rank notes, and by whom it hears of the others.
    """

    def __init__(self, folder: Path, watch: Watch) -> None:
        self.folder = folder
        self._watch = watch
        self._file = self._open()
        self._writing = threading.Lock()
        self._has_failed = False

    def _open(self) -> io.FileIO:
        """This rank's file; nowhere, if that cannot be had."""
        name = f"rank_{self._watch.rank:05d}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # on another host it may be for temporary files
            return (self.folder / name).open("ab", buffering=0)
        except OSError as error:
            logger.error("rank %d has no place for its reports: %s", self._watch.rank, describe(error))
            return Path(os.devnull).open("ab", buffering=0)

    def listen(self) -> None:
        """Write a report whenever there is cause to, from now on; called by the main thread."""
        faulthandler.enable(self._file)
        faulthandler.unregister(signal.SIGQUIT)
        # Python's handler does nothing; that it is there makes Python send the signal's number through the pipe.
        signal.signal(signal.SIGQUIT, lambda *_: None)
        numbers, sending = os.pipe()
        os.set_blocking(sending, False)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(numbers,), daemon=True, name="dsmoe reports").start()
        self._watch.reports = self

    def of_failure(self, why: str, error: BaseException | None = None) -> None:
        """Write a report, unless there has been one of a failure: what follows the first is its consequence."""
        if not self._has_failed:
            self._has_failed = True
            self.write(why, error)

    def beat(self) -> None:
        """Called now and then; if it is not for the watch's timeout, the bare stacks are written, without Python.

        That is so while a library keeps Python's lock.
        """
        faulthandler.dump_traceback_later(self._watch.timeout.total_seconds(), file=self._file)

    def write(self, why: str, error: BaseException | None = None) -> None:
        """Append a report; what hinders that (a full disk, storage that hangs) must not hide why the run ends."""
        with self._writing:
            try:
                text = self._text(why, error)
            except Exception as problem:
                text = f"{datetime.now():%Y-%m-%d %H:%M:%S}, because {why}; no more is known: {problem!r}\n"
            if within(FILE_SECONDS, lambda: self._file.write(text.encode())) is None:
                print(f"[rank {self._watch.rank}] could not write to {self.folder}", file=sys.stderr, flush=True)

    def gather(self, explanation: str) -> str:
        """Wait a moment for the other ranks' reports, and return which ranks stand together where.

        Both go to the log of the run and to `summary.txt`, whichever rank explains its end.
        """
        ranks, deadline = self._watch.world_size, time.monotonic() + WAIT_SECONDS
        while len(places := self._places()) < ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        together: dict[str, list[int]] = {}
        for rank in range(ranks):
            together.setdefault(places.get(rank, "no report"), []).append(rank)
        lines = [f"where each rank stood is in {self.folder} ({len(places)} of {ranks} have written):"]
        fewest_first = sorted(together.items(), key=lambda item: len(item[1]))
        lines += [f"  {rank_names(who)}: {place}" for place, who in fewest_first]
        text = "\n".join(lines)
        for path in (self.folder / "summary.txt", self.folder.parents[1] / "train.log"):
            with (
                contextlib.suppress(OSError),
                path.open("a", encoding="utf-8") as file,
            ):  # a full disk is not what ended the run
                file.write(f"{explanation}\n{text}\n")
        return text

    def close(self) -> None:
        """At an orderly end: leave nothing where nothing was reported."""
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

    def _answer(self, numbers: int) -> None:
        while sent := os.read(numbers, 64):
            if signal.SIGQUIT in sent:
                self.write("it was asked to (SIGQUIT)")
                self._watch.ask_for_reports()

    def _text(self, why: str, error: BaseException | None) -> str:
        note, seconds = self._watch.now()
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main = threading.main_thread().ident
        assert main is not None
        stack = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack(frames[main])
        lines = [
            f"=== rank {self._watch.rank} of {self._watch.world_size} on {socket.gethostname()}, process {os.getpid()}",
            f"{datetime.now():%Y-%m-%d %H:%M:%S}, because {why}",
            f"last note:  {note.place} (number {note.notes}, {seconds:.1f} s ago)",
            f"{_STANDS}{note.place}; {_innermost(stack)}",
            *_memory(),
            *_collectives(),
        ]
        if error is not None:
            lines += ["", "--- the error", "".join(traceback.format_exception(error)).rstrip()]
        for thread in sorted(frames, key=lambda ident: ident != main):
            name = names.get(thread, str(thread))
            if not name.startswith("dsmoe "):  # the watch's thread, and the one here
                lines += ["", f"--- thread {name}", "".join(traceback.format_stack(frames[thread])).rstrip()]
        return "\n".join(lines) + "\n\n"

    def _places(self) -> dict[int, str]:
        """By rank, where its last report says that it stood."""
        places = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob("rank_*.txt"):
                number = path.stem.removeprefix("rank_")
                if number.isdecimal() and (place := _last_place(path.read_text(errors="replace", encoding="utf-8"))):
                    places[int(number)] = place
        return places


def _last_place(text: str) -> str | None:
    """Where the last report of a rank's file says that it stood; None where there is none."""
    reports = re.split(rf"^(?=(?:{'|'.join(map(re.escape, (_STANDS, *_BARE)))}))", text, flags=re.M)
    if len(reports) == 1:
        return None
    last = reports[-1]
    first_line = last.splitlines()[0]
    if last.startswith(_STANDS):
        return first_line.removeprefix(_STANDS)
    # Of bare stacks, the thread that crashed is called the current one; else the main thread is the last one.
    threads = sorted(_BARE_THREAD.findall(last), key=lambda thread: thread[0] == "Current thread")
    return f"{first_line} {threads[-1][3]} ({_shown(threads[-1][1])}:{threads[-1][2]})" if threads else first_line


def _memory() -> Iterator[str]:
    """Of the process, and what torch's allocator has of the device."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    yield f"memory:     {pages * resource.getpagesize() / GIB:.2f} GiB resident, {peak:.2f} at most"
    if torch.cuda.is_initialized():
        # A main thread that waits for the device may hold the allocator's lock.
        yield f"device:     {within(DEVICE_SECONDS, _device_memory) or 'its allocator does not answer'}"


def _device_memory() -> str:
    now, most = torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    return f"{now:.2f} GiB allocated of {torch.cuda.memory_reserved() / GIB:.2f} reserved, {most:.2f} at most"


def _collectives() -> Iterator[str]:
    """The last ones that torch's flight recorder has, where torch has one: the last is the one that waits."""
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
    """The line that is being run, and the last one of dsmoe on the way to it."""
    frames = [frame for frame in stack if frame.filename != __file__]
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    shown = [frames[-1]] if not ours or ours[-1] is frames[-1] else [frames[-1], ours[-1]]
    return ", called by ".join(f"{frame.name} ({_shown(frame.filename)}:{frame.lineno})" for frame in shown)


def _shown(file: str) -> str:
    """A file's path from the folder of packages that it is in."""
    return file.split("/site-packages/")[-1].removeprefix(f"{Path(_PACKAGE).parent}/")
