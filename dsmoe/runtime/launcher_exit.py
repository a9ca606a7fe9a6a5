"""Stop this rank as SIGTERM does when the launcher that started it has gone: nobody would see it train on.

The processes that are watched, from a rank's parent upwards:

    torchrun              its agent, one on each host
    launch.py, deepspeed  `deepspeed` on one host, which does not hand SIGTERM on
    launch.py, sshd       `deepspeed --hostfile`: sshd's session ends when the connection does, so also when pdsh is
                          killed; and `deepspeed` itself, where that is a process of this host
    mpirun, slurmstepd    the daemons of MPI and Slurm, and others like them

and the scripts between a launcher and its ranks (`--no_python run.sh`). Not the shell in which a launcher was typed,
nor a parent that only sets RANK: they may end while what they have started goes on (`nohup`, `disown`).

Needs Linux' /proc, and no torch: a rank begins with this, before the seconds that importing torch takes.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from dsmoe.runtime.rendezvous import AGENTS, variables_of_agent
from dsmoe.runtime.reporting_rank import is_first_of_host

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How long a launcher may have gone before it is noticed."""

_RUNNERS = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"}
_LAUNCH = "deepspeed.launcher.launch"
_DAEMONS = {
    *("mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "prte"),  # Open MPI's
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy", "pmi_proxy"),  # MPICH's and Intel's
    *("palsd", "mpispawn", "flux-shell", "jsmd"),  # of PALS, MVAPICH2, Flux and jsrun
    *("slurmstepd", "entrypoint.py"),  # Slurm's, and the one of docker/
}


@dataclass(frozen=True)
class Process:
    """One process, also after its number has been given to another.

    Args:
        number: its id.
        started: when, in clock ticks since the host has started.
        command: its arguments, the program's name first.
    """

    number: int
    started: str
    command: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """What it runs: `torchrun` for `python3 -u /usr/bin/torchrun ...`, `sshd` for `sshd: root@notty`."""
        words = list(self.command) or [""]
        if Path(words[0]).name.startswith("python"):
            words = [word for word in words[1:] if not word.startswith("-")] or words
        return Path(words[0].split(":")[0]).name

    def has_gone(self) -> bool:
        """Whether it has ended; nobody need have asked for its exit code yet."""
        try:
            state, _, started = _status(self.number)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:  # too many open files, say
            return False
        return state in "ZX" or started != self.started


_GONE_BEFORE = Process(0, "", ("before this rank began",))
"""A launcher of which nothing is left to see; no process has this number."""


def watch_launcher() -> None:
    """Send SIGTERM to this process when what has launched it has gone; to be called as early as possible."""
    launchers = launchers_of(os.environ)
    if launchers:
        threading.Thread(target=_outlive, args=(launchers,), daemon=True, name="dsmoe launcher").start()


def launchers_of(environment: Mapping[str, str]) -> list[Process]:
    """The processes without which nobody looks after this rank, nearest first; none where no launcher is known.

    Args:
        environment: the rank's.
    """
    variables = variables_of_agent(environment)
    by_agent = any(name in variables for name in AGENTS)
    try:
        _, parent, _ = _status("self")  # not os.getppid(): /proc may be another namespace's, with other numbers
    except OSError:
        return []
    ancestors = list(_ancestors(parent))
    scripts = list(takewhile(lambda process: _has_variables(process, variables), ancestors)) if by_agent else []
    rest = ancestors[len(scripts) :]
    if not rest or not (by_agent or rest[0].program in _DAEMONS):
        return []
    if by_agent and _is_init(rest[0]):
        return [_GONE_BEFORE]
    launchers = [*scripts, rest[0]]
    for above in rest[1:]:
        if not _has_launched(above, launchers[-1]):
            break
        launchers.append(above)
    if launchers[-1].program.startswith("sshd"):
        launchers += _runner_here(launchers)
    return launchers


def _outlive(launchers: list[Process]) -> None:
    """Wait until one of the launchers has gone, let the first rank of this host say so, and stop."""
    while True:
        gone = next((process for process in launchers if process.has_gone()), None)
        if gone is not None:
            break
        time.sleep(LOOK_SECONDS)
    if is_first_of_host():
        what = f"the launcher has gone ({gone.program}, process {gone.number})"
        logger.error("%s: %s; its ranks are told to stop (SIGTERM)", platform.node(), what)
    else:
        time.sleep(2 * LOOK_SECONDS)  # all ranks stop when one does, and that one is to have said why
    os.kill(os.getpid(), signal.SIGTERM)


def _is_init(process: Process) -> bool:
    """Whether it is what ranks are left to when their agent has ended; both agents are Python, if one is process 1."""
    return process.number == 1 and not Path(process.command[0]).name.startswith("python")


def _has_launched(above: Process, below: Process) -> bool:
    """Whether a launcher's parent is a part of it: DeepSpeed's runner, or ssh's end on this host and its shell."""
    if below.program in _RUNNERS:
        return False
    by_ssh = above.program.startswith("sshd") or any(_LAUNCH in word for word in above.command)
    return above.program in _RUNNERS or (by_ssh and any(_LAUNCH in word for word in below.command))


def _runner_here(launchers: list[Process]) -> list[Process]:
    """The `deepspeed --hostfile` that has started launch.py by pdsh, if it is a process of this host."""
    same = ("--world_info=", "--master_addr=", "--master_port=")
    words = {word for process in launchers for word in process.command if word.startswith(same)}
    for number in [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]:
        pair = list(islice(_ancestors(number), 2))
        if (
            len(pair) == 2
            and pair[0].program == "pdsh"
            and words <= set(pair[0].command)
            and pair[1].program in _RUNNERS
        ):
            return pair[1:]
    return []


def _ancestors(number: int) -> Iterator[Process]:
    """The process of that id, its parent and so on, as far as this process may look."""
    while number > 0:  # the parent of a namespace's first process is 0
        try:
            _, parent, started = _status(number)
            command = Path(f"/proc/{number}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            return
        yield Process(number, started, tuple(word.decode(errors="replace") for word in command))
        number = parent


def _has_variables(process: Process, variables: Mapping[str, str]) -> bool:
    """Whether a process was started with these variables, as far as this process may know."""
    try:
        environment = set(Path(f"/proc/{process.number}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False
    return all(os.fsencode(f"{name}={value}") in environment for name, value in variables.items())


def _status(number: int | str) -> tuple[str, int, str]:
    """A process' state, its parent's id, and when it started.

    `229 (python3 (x)) S 227 ...`: what is in brackets may be anything, the rest are numbers.
    """
    text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), fields[19]
