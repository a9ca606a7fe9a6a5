"""One program with a time limit: nothing that it does, and nothing that it starts, outlives or harms its caller.

A program may hang, be killed, print without end, or leave children in sessions of their own, as torchrun's workers are.
Whatever it has started inherits a mark in its environment, by which it is found in the end. If the caller is killed, a
guard (`python -m benchmarks.gpu.supervise MARK`) does that: what stays on a device disturbs what is measured next.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "DSMOE_SUPERVISED"
MOST_OUTPUT = 64 * 2**20
"""Bytes of output after which a program is ended: it prints without end."""
KEPT_OUTPUT = 2**20
"""Bytes of it that are kept from its beginning, and from its end."""
POLL_SECONDS = 0.1
STACKS_SECONDS = 3.0
"""How long a program that is ended has to write where each of its threads stands."""
GONE_SECONDS = 10.0
"""How long to wait for killed processes to disappear: a driver may hold one for ever."""
_ERROR = re.compile(r"(\[rank ?\d+\]:? *)?(error: .|[\w.]*(Error|Exception)(: .|$))")
_OF_A_LAUNCHER = re.compile(r"ChildFailedError|CalledProcessError")


@dataclass(frozen=True)
class End:
    """The end of a program.

    Attributes:
        why: None where it ended by itself with exit code 0; else one sentence.
        word: `done`, `failed`, `out of time`, `killed`, or `interrupted` where this process was, by Ctrl-C or SIGTERM.
        seconds: how long it ran.
    """

    word: str
    why: str | None
    seconds: float


def supervise(
    command: Sequence[str], log: Path, limit_seconds: float, environment: Mapping[str, str], folder: Path
) -> End:
    """Run the program in `folder`, its output in `log`, and end it and all that it has started when the time is up."""
    mark = uuid.uuid4().hex
    # With PYTHONFAULTHANDLER, Python answers SIGABRT with the stacks of all threads.
    marked = {**environment, MARK: mark, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    try:
        output = log.open("wb")
    except OSError as error:
        return End("failed", f"cannot write {log}: {error.strerror}", 0.0)
    with output, _guard(mark, folder):
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=marked,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            return End("failed", f"cannot start {command[0]}: {error.strerror}", 0.0)
        try:
            with suppress(OSError):  # a core file would have the device's memory in it
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            why_ended = _wait(process, log, begun + limit_seconds)
            if why_ended is not None:
                _send(signal.SIGABRT, mark)
                _wait(process, log, time.monotonic() + STACKS_SECONDS)
        except KeyboardInterrupt:
            return End("interrupted", "interrupted", time.monotonic() - begun)
        finally:
            left = _end_all(mark)
            if not left:
                process.wait()
    seconds = time.monotonic() - begun
    _shorten(log)
    if left:
        left_over = f"; {left} of its processes cannot be ended (a driver holds them?)"
        return End("killed", f"{why_ended or 'it had ended'}{left_over}", seconds)
    if why_ended is not None:
        return End("out of time", f"{why_ended}; where it stood is at the end of {log.name}", seconds)
    return _judged(process.returncode, log, seconds)


@contextmanager
def _guard(mark: str, folder: Path) -> Iterator[None]:
    """End all that has the mark when this process has ended, however: the guard then reads the end of its input."""
    command = [sys.executable, "-m", "benchmarks.gpu.supervise", mark]
    guard = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def end_tree(process: subprocess.Popen[bytes], *, stacks_seconds: float = 0.0) -> None:
    """Kill a process and all that it has started; before that, let each write its threads' stacks, if there is time."""
    started: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    if stacks_seconds:
        process.send_signal(signal.SIGABRT)
        _signal(started, signal.SIGABRT)
        # psutil must not wait for the process itself: its exit code would be gone.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=stacks_seconds)
        psutil.wait_procs(started, timeout=stacks_seconds)
    process.send_signal(signal.SIGKILL)
    _signal(started, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str | None:
    """Wait for its end; why it has to be ended, where it has not come."""
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() > deadline:
            return f"its time was up after {time.monotonic() - begun:.0f} s"
        if _size(log) > MOST_OUTPUT:
            return f"it had printed more than {MOST_OUTPUT / 2**20:.0f} MiB"
        time.sleep(POLL_SECONDS)
    return None


def _judged(code: int, log: Path, seconds: float) -> End:
    if code == 0:
        return End("done", None, seconds)
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps by the kernel for want of memory" if code == -signal.SIGKILL else ""
        return End("killed", f"{name}{memory}", seconds)
    return End("failed", f"exit code {code}: {last_line(log)}", seconds)


def last_line(log: Path) -> str:
    """The line of output that tells most, of at most 200 characters; what cannot be printed is replaced.

    That is the last error, but for those by which a launcher says that one of its ranks had one, or else the last line.
    """
    try:
        with log.open("rb") as output:
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - 65_536))
            text = output.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"its output cannot be read: {error.strerror}"
    lines = ["".join(c if c.isprintable() else "?" for c in line).strip() for line in text.splitlines()]
    lines = [line for line in lines if any(c.isalnum() for c in line)]
    errors = [line for line in lines if _ERROR.match(line) and not _OF_A_LAUNCHER.search(line)]
    return [*(lines or ["it printed nothing"]), *errors][-1][:200]


def _marked(mark: str) -> list[psutil.Process]:
    """All living processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # gone, or another user's
            continue
    return found


def _send(number: signal.Signals, mark: str) -> list[psutil.Process]:
    """Send a signal to all that has the mark; returns them."""
    processes = _marked(mark)
    _signal(processes, number)
    return processes


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _end_all(mark: str) -> int:
    """Kill until nobody with the mark is left; how many could not be."""
    deadline = time.monotonic() + GONE_SECONDS
    while processes := _send(signal.SIGKILL, mark):
        if time.monotonic() > deadline:
            return len(processes)
        time.sleep(POLL_SECONDS)
    return 0


def _size(log: Path) -> int:
    """Bytes of output; 0 where somebody has removed it."""
    with suppress(OSError):
        return log.stat().st_size
    return 0


def _shorten(log: Path) -> None:
    """Keep the beginning and the end of a long output."""
    size = _size(log)
    if size <= 2 * KEPT_OUTPUT:
        return
    with log.open("r+b") as output:
        output.seek(size - KEPT_OUTPUT)
        end = output.read()
        output.seek(KEPT_OUTPUT)
        output.write(f"\n... {size - 2 * KEPT_OUTPUT} bytes left out ...\n".encode())
        output.write(end)
        output.truncate()


if __name__ == "__main__":
    sys.stdin.read()
    _end_all(sys.argv[1])
