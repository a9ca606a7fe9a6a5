"""Read the arguments and check the config before torch is imported, and say once for all ranks what is wrong.

Importing torch and DeepSpeed takes every rank seconds, and minutes where the ranks of a host share few cores or the
packages are on slow storage. Who mistypes a path is told before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsmoe.config.errors import HostError, UserError, exit_code_of
from dsmoe.config.load import ConfigCheck, load_config
from dsmoe.config.schema import Config
from dsmoe.exit_codes import DONE, INTERRUPTED
from dsmoe.plan.devices import device_problems
from dsmoe.plan.plan import Plan
from dsmoe.runtime.launcher_exit import watch_launcher
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.reporting_rank import LINGER_SECONDS, print_for_host, signed, speaks_for_job
from dsmoe.runtime.standard_streams import finish_streams, steady_streams
from dsmoe.runtime.variables import LauncherError
from dsmoe.runtime.world import (
    check_meeting,
    join_launcher,
    launched_plan,
    launcher_has_store,
    world_problems,
)

STAY_SECONDS = 3.0
"""How long rank 0, which has said what is wrong, stays for the others to hear that; torch takes longer to import."""


class UsageError(UserError):
    """Wrong arguments; `usage` is what argparse prints before it says so."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """The arguments of a program of which a launcher starts many: one of them prints the help and the errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError: another rank than the first may have to tell it."""
        raise UsageError(f"{self.prog}: error: {message}", self.format_usage())

    def _print_message(self, message: str, file: Any = None) -> None:
        if speaks_for_job():
            super()._print_message(message, file)


@dataclass(frozen=True)
class Start:
    """What the command line says: the options and the plan of a run, or what is wrong with them."""

    options: argparse.Namespace
    planned: Plan | None
    """None where something is wrong, or where the command makes plans of its own (`begin_with`'s `check`)."""
    error: UserError | None = None
    launcher_error: LauncherError | None = None
    """Why the ranks cannot ask each other who says what is wrong; said with `error`, where there is both."""

    @property
    def plan(self) -> Plan:
        """The run on the ranks that the launcher started.

        Raises:
            UserError: it is wrong, or the arguments are, or the launcher.
        """
        error = self.error or self.launcher_error
        if error is not None:
            raise error
        assert self.planned is not None
        return self.planned

    def ended(self) -> int | None:
        """Say what is wrong, if this rank is to; the exit code. None where torch is needed: to train, or to tell it.

        Rank 0 speaks. Another rank whose error rank 0 has as well has no more to say. If rank 0 has another one, or
        nobody can be told, it speaks for itself; else rank 0 is about to train, and waits for this rank. Where the
        launcher's variables are wrong, ranks do not know of each other, and one of each host speaks.
        """
        if self.launcher_error is not None:
            errors = [error for error in (self.error, self.launcher_error) if error is not None]
            print_for_host("\n".join(map(_text, errors)))
            return max(map(exit_code_of, errors))
        if self.error is None:
            return None
        text, code = _text(self.error), exit_code_of(self.error)
        if speaks_for_job():
            print(text, file=sys.stderr, flush=True)
            _stay_for_others(_answer(text) + bytes([code]))
            return code
        if Rendezvous.from_environment().complete() is None:
            time.sleep(LINGER_SECONDS)
            return code
        answer = _answer_of_rank_0()
        if answer is None:
            return None
        if answer[:-1] != _answer(text):
            print(signed(Rendezvous.from_environment().rank, text), file=sys.stderr, flush=True)
            return code
        return answer[-1]


def begin(parser: Parser, arguments: Sequence[str] | None = None) -> Start:
    """Read the arguments, the process' own by default, and what its launcher says; load the config and check it.

    With `--help` rank 0 prints the help, and all end.
    """
    steady_streams()
    launcher_error = _join()
    try:
        options = parser.parse_intermixed_args(arguments)
    except UsageError as error:
        return _started(argparse.Namespace(), None, error, launcher_error)
    return _check(options, options.config, options.overrides, None, launcher_error)


def begin_with(path: str, overrides: Sequence[str], check: Callable[[Config], object] | None = None) -> Start:
    """The same for a command that has read its arguments, and for which nobody has begun to watch the launcher.

    Args:
        path: the config's.
        overrides: settings over it.
        check: what has to be right besides; raises UserError. By default, that it is a config of these ranks.
    """
    steady_streams()
    watch_launcher()
    return _check(argparse.Namespace(), path, overrides, check, _join())


def wrong_arguments(error: UsageError) -> Start:
    """The same for a command whose arguments cannot be read."""
    return _started(argparse.Namespace(), None, error, _join())


def program(name: str, description: str) -> Parser:
    """The arguments that pretrain.py and preflight.py have in common."""
    parser = Parser(prog=name, description=description)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def pretrain_program() -> Parser:
    """The arguments of pretrain.py."""
    return program("pretrain.py", "Pretrain a language model from one YAML file.")


def preflight_program() -> Parser:
    """The arguments of preflight.py."""
    parser = program("preflight.py", "Check every node and link before a long job.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers (in the run's folder)")
    return parser


@contextmanager
def interruptible() -> Iterator[None]:
    """End with 130 and one line, for all ranks, at Ctrl-C (SIGINT) where nothing else is done about it."""
    try:
        yield
    except KeyboardInterrupt:
        if speaks_for_job():
            print("stopped by SIGINT, at once", file=sys.stderr, flush=True)
        finish_streams()
        os._exit(INTERRUPTED)


def end_process(code: int) -> NoReturn:
    """End with `code`; after a failure at once, since leaving groups whose ranks are gone can wait for a timeout."""
    finish_streams()
    if code != DONE:
        os._exit(code)
    sys.exit(code)


def load_on_host(path: str, overrides: Sequence[str], *looks: ConfigCheck) -> Config:
    """The config that a launcher has named to every host.

    Raises:
        UserError: it is wrong, or the `looks` have found something.
        HostError: this host, which is not rank 0's, has not the file.
    """
    try:
        return load_config(path, overrides, *looks)
    except UserError as error:
        if Path(path).exists() or speaks_for_job():
            raise
        raise HostError(str(error)) from error


def _join() -> UserError | None:
    """Read what the launcher says; returns what is wrong with it."""
    try:
        join_launcher()
        # Ranks that have met already, through a file, have port 0 (`run_ranks`); joining refuses it to all others.
        rendezvous = Rendezvous.from_environment()
        if rendezvous.is_launched and rendezvous.port != 0:
            check_meeting()
    except UserError as error:
        return error
    return None


def _check(
    options: argparse.Namespace,
    path: str,
    overrides: Sequence[str],
    check: Callable[[Config], object] | None,
    launcher_error: UserError | None,
) -> Start:
    """Load the config; check it where it is known which ranks there are, by default that it is one of these."""
    looks = (world_problems, device_problems) if check is None and launcher_error is None else ()
    try:
        given, plan = load_on_host(path, overrides, *looks), None
        if launcher_error is None and check is None:
            plan = launched_plan(given)
        elif launcher_error is None and check is not None:
            check(given)
    except UserError as error:
        return _started(options, None, error, launcher_error)
    return _started(options, plan, None, launcher_error)


def _started(
    options: argparse.Namespace, plan: Plan | None, error: UserError | None, launcher_error: UserError | None
) -> Start:
    if isinstance(launcher_error, LauncherError):
        return Start(options, plan, error, launcher_error)
    return Start(options, plan, error or launcher_error)  # an error of the launcher's that all ranks have alike


def _text(error: UserError) -> str:
    return f"{error.usage}{error}" if isinstance(error, UsageError) else f"error: {error}"


def _answer(text: str) -> bytes:
    """What rank 0 sends to a rank that asks: that it has ended, and by which error."""
    return b"dsmoe: " + hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _stay_for_others(answer: bytes) -> None:
    """Tell the other ranks that it is said, at the port where all would have met; torchrun's agent is there already."""
    rendezvous = Rendezvous.from_environment()
    if rendezvous.size in (None, 1) or rendezvous.port is None or launcher_has_store():
        return
    deadline = time.monotonic() + STAY_SECONDS
    family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    address = ("", rendezvous.port)
    with (
        suppress(OSError, OverflowError),
        socket.create_server(address, backlog=4096, **family) as server,  # type: ignore[arg-type]
    ):
        for _ in range(rendezvous.size - 1):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(answer)


def _answer_of_rank_0() -> bytes | None:
    """What rank 0 has ended by, and its exit code; None where it does not say so: it lives, or ended long ago."""
    rendezvous = Rendezvous.from_environment()
    address = (rendezvous.address, rendezvous.port)
    deadline = time.monotonic() + STAY_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(address, timeout=1) as connection:
            received = b""
            with suppress(TimeoutError):  # torch's store waits to be asked
                while more := connection.recv(64):
                    received += more
            return received if received.startswith(b"dsmoe: ") and len(received) == len(_answer("")) + 1 else None
        time.sleep(0.05)
    return None
