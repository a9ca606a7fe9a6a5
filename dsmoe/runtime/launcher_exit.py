"""Exit with the launcher: stop this rank as SIGTERM does when the launcher that started it has ended.

Nobody would see such a rank train on. The processes that are watched, from a rank's parent upwards:

    torchrun              its agent, one on each host
    launch.py, deepspeed  `deepspeed` on one host, which does not forward SIGTERM
    launch.py, sshd       `deepspeed --hostfile`: sshd's session ends when the connection does, so also when pdsh is
                          killed; and `deepspeed` itself, if it is a process of this host
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

from dsmoe.runtime.rendezvous import AGENT_VARIABLES, agent_variables
from dsmoe.runtime.reporting_rank import is_host_leader

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""The time between two checks of the launchers."""

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
    """A process, told apart from a later one with the same id by its start time.

    Args:
        number: the process id.
        started: the start time, in clock ticks since the host has started.
        command: the arguments, the program's name first.
    """

    number: int
    started: str
    command: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """The name of the program: `torchrun` for `python3 -u /usr/bin/torchrun ...`, `sshd` for `sshd: root@notty`."""
        words = list(self.command) or [""]
        if Path(words[0]).name.startswith("python"):
            words = [word for word in words[1:] if not word.startswith("-")] or words
        return Path(words[0].split(":")[0]).name

    def has_gone(self) -> bool:
        """Return whether the process has ended; a zombie has."""
        try:
            state, _, started = _status(self.number)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:  # too many open files, say
            return False
        return state in "ZX" or started != self.started


_GONE_BEFORE = Process(0, "", ("before this rank began",))
"""A launcher that had ended before this rank began; no process has this id."""


def watch_launcher() -> None:
    """Send SIGTERM to this process when one of its launchers has ended; call as early as possible."""
    launchers = launchers_of(os.environ)
    if launchers:
        threading.Thread(target=_stop_with_launcher, args=(launchers,), daemon=True, name="dsmoe launcher").start()


def launchers_of(environment: Mapping[str, str]) -> list[Process]:
    """Return the launchers of this rank, from its parent upwards; none if the launcher is unknown.

    Args:
        environment: the rank's environment.
    """
    # `deepspeed --num_gpus 2 train.py` from a shell, seen from a rank upwards:
    #   run.sh              has RANK in its environment, as the rank has: a script between the agent and the rank
    #   launch.py           the first ancestor without RANK: the agent
    #   deepspeed           started launch.py: part of the launcher
    #   bash                not part of it, may end with `nohup`: not watched
    variables = agent_variables(environment)
    by_agent = any(name in variables for name in AGENT_VARIABLES)
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
        launchers += _local_runner(launchers)
    return launchers


def _stop_with_launcher(launchers: list[Process]) -> None:
    """Wait until a launcher has ended, log that on the leader of this host, and send SIGTERM to this process."""
    while True:
        gone = next((process for process in launchers if process.has_gone()), None)
        if gone is not None:
            break
        time.sleep(POLL_SECONDS)
    if is_host_leader():
        what = f"the launcher has gone ({gone.program}, process {gone.number})"
        logger.error("%s: %s; its ranks are told to stop (SIGTERM)", platform.node(), what)
    else:
        time.sleep(2 * POLL_SECONDS)  # the first rank to stop ends all of them, and the leader has to log first
    os.kill(os.getpid(), signal.SIGTERM)


def _is_init(process: Process) -> bool:
    """Return whether a process is init, which inherits the ranks of an agent that has ended; an agent is Python."""
    return process.number == 1 and not Path(process.command[0]).name.startswith("python")


def _has_launched(above: Process, below: Process) -> bool:
    """Return whether a launcher's parent belongs to it: DeepSpeed's runner, or sshd's process and its shell."""
    if below.program in _RUNNERS:
        return False
    by_ssh = above.program.startswith("sshd") or any(_LAUNCH in word for word in above.command)
    return above.program in _RUNNERS or (by_ssh and any(_LAUNCH in word for word in below.command))


def _local_runner(launchers: list[Process]) -> list[Process]:
    """The `deepspeed --hostfile` that has started launch.py by pdsh, if it runs on this host."""
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
    """The process with this id, its parent and so on, as far as this process may read them."""
    while number > 0:  # the parent of a namespace's first process is 0
        try:
            _, parent, started = _status(number)
            command = Path(f"/proc/{number}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            return
        yield Process(number, started, tuple(word.decode(errors="replace") for word in command))
        number = parent


def _has_variables(process: Process, variables: Mapping[str, str]) -> bool:
    """Return whether a process was started with these variables, as far as this process may read them."""
    try:
        environment = set(Path(f"/proc/{process.number}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False
    return all(os.fsencode(f"{name}={value}") in environment for name, value in variables.items())


def _status(number: int | str) -> tuple[str, int, str]:
    """A process' state, its parent's id, and its start time in clock ticks.

    `229 (python3 (x)) S 227 ...`: the name in brackets may have brackets, the rest are numbers.
    """
    text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), fields[19]
