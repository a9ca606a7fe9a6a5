"""The processes of one start of the kill loop: two ranks, what has started them, and their output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dsmoe import cli
from dsmoe.runtime.spawn import CONTEXT
from tests.helpers import marked
from tests.helpers.ports import free_port

RANKS = 2
PATIENCE = 240.0
"""Seconds for anything."""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"],
    "deepspeed": ["deepspeed.launcher.runner", f"--num_gpus={RANKS}", "--master_port"],
}


class Started:
    """Processes that can be stopped for a moment, killed, and waited for; what they print goes to `output`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.ranks: list[psutil.Process] = []
        """Whom to kill, rank 0 first."""
        output.write_text("", encoding="utf-8")

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def codes(self) -> list[int | None]:
        """The exit code of each process that was started here, None while it runs."""
        raise NotImplementedError

    def launchers(self) -> list[psutil.Process]:
        """What has started the ranks, other than this program."""
        return []

    def is_running(self) -> bool:
        return all(code is None for code in self.codes())

    def join(self) -> list[int | None]:
        """Wait for the end of all of them."""
        wait_for(lambda: all(code is not None for code in self.codes()), self.said)
        return self.codes()

    def stop(self) -> None:
        """Let no rank do anything any more, for now: what is there on the disk stays as it is."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not all(map(_stands_still, self.ranks)):
            time.sleep(0.0002)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _signal(self, number: int) -> None:
        for process in self.ranks:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Forked(Started):
    """Forked from a server that has torch already: the ranks as torchrun starts them, or `dsmoe prepare`."""

    def __init__(self, output: Path, main: Callable[..., None], arguments: list[str], number: int) -> None:
        super().__init__(output)
        # Where the ranks meet is in this process, which nobody kills.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = [
            CONTEXT.Process(target=main, args=(rank, self._store.port, arguments, str(output)))
            for rank in range(number)
        ]
        for process in self._processes:
            process.start()
        self.ranks = [psutil.Process(process.pid) for process in self._processes]

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self._processes]


class Launched(Started):
    """Ranks under a launcher; stands here when all of them are there."""

    def __init__(self, output: Path, launcher: str, arguments: list[str]) -> None:
        super().__init__(output)
        port = [free_port()] if launcher == "deepspeed" else []
        command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, marked.__file__, *arguments]
        bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        path = ":".join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with output.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                cwd=output.parent,
                env={**os.environ, **settings, "PATH": bin_first, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: len(self._find_ranks()) == RANKS or self._process.poll() is not None, self.said)

    def codes(self) -> list[int | None]:
        return [self._process.poll()]

    def launchers(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            return [top, *(child for child in top.children(recursive=True) if child not in self.ranks)]
        return []

    def _find_ranks(self) -> list[psutil.Process]:
        """Whichever processes have a rank, which the launchers in between have not."""
        found: dict[str, psutil.Process] = {}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if rank := process.environ().get("RANK"):
                        found.setdefault(rank, process)
        self.ranks = [found[rank] for rank in sorted(found)]
        return self.ranks


def start_ranks(output: Path, arguments: list[str], launcher: str | None = None) -> Started:
    """`launch/pretrain.py ARGUMENTS` on two ranks, under a launcher or as one starts them."""
    return Launched(output, launcher, arguments) if launcher else Forked(output, _rank_main, arguments, RANKS)


def start_prepare(output: Path, arguments: list[str]) -> Started:
    """`dsmoe prepare ARGUMENTS`."""
    return Forked(output, _prepare_main, arguments, 1)


def wait_for(condition: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.0005)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended, and that nobody has asked for its exit code, does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _stands_still(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return True


def _rank_main(rank: int, port: int, arguments: list[str], output: str) -> None:
    _print_to(output)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    sys.argv = [str(marked.PRETRAIN), *arguments]
    marked.main()


def _prepare_main(_rank: int, _port: int, arguments: list[str], output: str) -> None:
    _print_to(output)
    os._exit(cli.main(["prepare", *arguments]))


def _print_to(output: str) -> Any:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
