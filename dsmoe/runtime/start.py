"""Start of a program: read arguments and check the config before torch is imported; print an error once for all.

Importing torch and DeepSpeed takes every rank seconds, and minutes where the ranks of a host share few cores or the
packages are on slow storage. A mistyped path is reported before that.
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
from dsmoe.runtime.reporting_rank import LINGER_SECONDS, print_once_per_host, reports_for_job, signed
from dsmoe.runtime.standard_streams import flush_streams, tolerate_stream_errors
from dsmoe.runtime.variables import LauncherError
from dsmoe.runtime.world import (
    check_rendezvous,
    launched_plan,
    launcher_has_store,
    set_rank_variables,
    world_problems,
)

ANSWER_SECONDS = 3.0
"""The time in which rank 0, having printed an error, answers the other ranks; importing torch takes longer."""


class UsageError(UserError):
    """Wrong arguments; `usage` is the line that argparse prints before the error."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """The argument parser of a program with many ranks: one of them prints the help and the errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError: the rank to print it may be another than rank 0."""
        raise UsageError(f"{self.prog}: error: {message}", self.format_usage())

    def _print_message(self, message: str, file: Any = None) -> None:
        if reports_for_job():
            super()._print_message(message, file)


@dataclass(frozen=True)
class Start:
    """The command line of a rank: the options and the plan of a run, or what is wrong with them."""

    options: argparse.Namespace
    planned: Plan | None
    """None where something is wrong, or where the command makes plans of its own (`begin_command`'s `check`)."""
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
            print_once_per_host("\n".join(map(_text, errors)))
            return max(map(exit_code_of, errors))
        if self.error is None:
            return None
        text, code = _text(self.error), exit_code_of(self.error)
        if reports_for_job():
            print(text, file=sys.stderr, flush=True)
            _serve_answer(_answer(text) + bytes([code]))
            return code
        if Rendezvous.from_environment().complete() is None:
            time.sleep(LINGER_SECONDS)
            return code
        answer = _ask_rank_0()
        if answer is None:
            return None
        if answer[:-1] != _answer(text):
            print(signed(Rendezvous.from_environment().rank, text), file=sys.stderr, flush=True)
            return code
        return answer[-1]


def begin(parser: Parser, arguments: Sequence[str] | None = None) -> Start:
    """Read the arguments, by default those of the process, and the launcher's variables; load and check the config.

    With `--help` rank 0 prints the help, and all ranks exit.
    """
    tolerate_stream_errors()
    launcher_error = _join()
    try:
        options = parser.parse_intermixed_args(arguments)
    except UsageError as error:
        return _started(argparse.Namespace(), None, error, launcher_error)
    return _check(options, options.config, options.overrides, None, launcher_error)


def begin_command(path: str, overrides: Sequence[str], check: Callable[[Config], object] | None = None) -> Start:
    """Do as `begin` for a command that has read its arguments itself, and does not watch its launcher yet.

    Args:
        path: the config's path.
        overrides: `section.key=value`, over the config.
        check: a further check of the config, which raises UserError; by default, that it fits the started ranks.
    """
    tolerate_stream_errors()
    watch_launcher()
    return _check(argparse.Namespace(), path, overrides, check, _join())


def begin_failed(error: UsageError) -> Start:
    """Return the start of a command whose arguments are wrong."""
    return _started(argparse.Namespace(), None, error, _join())


def _common_parser(name: str, description: str) -> Parser:
    """The arguments that pretrain.py and preflight.py share."""
    parser = Parser(prog=name, description=description)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def pretrain_parser() -> Parser:
    """Return the argument parser of pretrain.py."""
    return _common_parser("pretrain.py", "Pretrain a language model from one YAML file.")


def preflight_parser() -> Parser:
    """Return the argument parser of preflight.py."""
    parser = _common_parser("preflight.py", "Check every node and link before a long job.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers (in the run's folder)")
    return parser


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with 130 and one line for all ranks at Ctrl-C (SIGINT), unless the body handles that."""
    try:
        yield
    except KeyboardInterrupt:
        if reports_for_job():
            print("stopped by SIGINT, at once", file=sys.stderr, flush=True)
        flush_streams()
        os._exit(INTERRUPTED)


def exit_process(code: int) -> NoReturn:
    """Exit with `code`; after a failure at once, since destroying groups whose ranks are gone can take a timeout."""
    flush_streams()
    if code != DONE:
        os._exit(code)
    sys.exit(code)


def load_on_host(path: str, overrides: Sequence[str], *looks: ConfigCheck) -> Config:
    """The config that a launcher has named to every host.

    Raises:
        UserError: the config is wrong, or one of the `looks` has found a problem.
        HostError: the file does not exist on this host, which is not rank 0's.
    """
    try:
        return load_config(path, overrides, *looks)
    except UserError as error:
        if Path(path).exists() or reports_for_job():
            raise
        raise HostError(str(error)) from error


def _join() -> UserError | None:
    """Set the rank variables; returns the error in the launcher's variables, if there is one."""
    try:
        set_rank_variables()
        # Ranks whose rendezvous was a file have port 0 (`run_ranks`); joining refuses port 0 to all others.
        rendezvous = Rendezvous.from_environment()
        if rendezvous.is_launched and rendezvous.port != 0:
            check_rendezvous()
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
    """Load the config, and check it if the ranks are known, by default that it fits them."""
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
    """Rank 0's answer to a rank that asks, without the exit code: it has ended, by the error with this text."""
    return b"dsmoe: " + hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _serve_answer(answer: bytes) -> None:
    """Answer the other ranks at the port of the rendezvous, unless that is torchrun's: the error has been printed."""
    rendezvous = Rendezvous.from_environment()
    if rendezvous.size in (None, 1) or rendezvous.port is None or launcher_has_store():
        return
    deadline = time.monotonic() + ANSWER_SECONDS
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


def _ask_rank_0() -> bytes | None:
    """Return rank 0's answer: a digest of its error, and its exit code; None if it has not ended, or ended long ago."""
    rendezvous = Rendezvous.from_environment()
    address = (rendezvous.address, rendezvous.port)
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(address, timeout=1) as connection:
            received = b""
            with suppress(TimeoutError):  # torch's store sends nothing by itself
                while more := connection.recv(64):
                    received += more
            return received if received.startswith(b"dsmoe: ") and len(received) == len(_answer("")) + 1 else None
        time.sleep(0.05)
    return None
