"""The exceptions that every command reports as one message, without a traceback, and the exit code of each."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from dsmoe.exit_codes import FAILED, USER_ERROR

Problem = tuple[str, str]
"""The dotted key that a problem is about, for its place in the file, and the message."""

_MOST_SHOWN = 50


class UserError(ValueError):
    """The input is wrong and the message says how to put it right; commands print it and exit with code 2."""

    exit_code = USER_ERROR


class HostError(UserError):
    """What is wrong on this host, and may be right on the others."""

    exit_code = FAILED


class PassingError(UserError):
    """What may be right at another try: a lock that is held, a full disk, storage that does not answer."""

    exit_code = FAILED


class ExplainedError(RuntimeError):
    """What ends a run and is no mistake in its input; the message says all, and is printed without a traceback."""


def refuse(problems: Iterable[Problem]) -> None:
    """Refuse what a constructor was given, by the keys' names within their sections: its arguments have none.

    Raises:
        UserError: there are problems; a line for each.
    """
    messages = [re.sub(r"\b(cluster|parallel|model|moe)\.(?=[a-z])", "", message) for _, message in problems]
    if messages:
        raise UserError("\n".join(messages))


_FOR_A_PERSON = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    }
)
"""Errors of the system that are there at the next try as well, until somebody changes a path or a permission.

All others pass, or may: too many open files, a stale handle, no memory, a connection. So may a full disk or quota,
which many share: other jobs end, and what they wrote is removed.
"""


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that an error ends: 2 where a person has to change something, else 1."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return USER_ERROR if error.errno in _FOR_A_PERSON else FAILED
    return FAILED


def system_error(message: str, error: OSError) -> UserError:
    """The error that says `message`, with the exit code of what the system has answered."""
    return UserError(message) if exit_code_of(error) == UserError.exit_code else PassingError(message)


def describe(error: OSError) -> str:
    """`/data/a.txt: No space left on device`, or what there is of it; both names where a file was to get another."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {reason}" if names else reason


def located(error: OSError) -> str:
    """The same, and the line of dsmoe that met it, for whoever has no traceback: `... (dsmoe/data/cache.py:52)`."""
    place = getattr(error, "place", None) or _place(error)
    return f"{describe(error)} ({place})" if place else describe(error)


def keep_place(error: Exception, where: str) -> None:
    """Let the error have with it where it was raised, before it is sent to other processes, which loses its traceback.

    Args:
        error: is changed: `located` and a printed traceback have it.
        where: in which process.
    """
    if isinstance(error, UserError):
        return
    if place := _place(error):
        error.place = f"{place}, {where}"  # type: ignore[attr-defined]
    error.add_note(f"raised {where}:\n{''.join(traceback.format_tb(error.__traceback__)).rstrip()}")


def _place(error: BaseException) -> str | None:
    """The last line of dsmoe on the way to where it was raised."""
    package = Path(__file__).parents[1]
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [f"{file.relative_to(package.parent)}:{line}" for file, line in lines if file.is_relative_to(package)]
    return own[-1] if own else None


class ConfigError(UserError):
    """Everything that is wrong with one configuration.

    `problems` has one line per problem, each with its key and its place. `str()` is that line if there is one
    problem, else a heading that names `source`, the file that was loaded, and an indented list.
    """

    def __init__(self, problems: Iterable[str], source: str) -> None:
        self.problems = list(problems)
        self.source = source
        # The constructor's own arguments, not the text: an exception is pickled by calling its class with `args`.
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        heading = f"{len(self.problems)} problems in {self.source}:"
        shown = [f"  - {problem}" for problem in self.problems[:_MOST_SHOWN]]
        more = len(self.problems) - _MOST_SHOWN
        return "\n".join([heading, *shown, *([f"  ... and {more:,} more"] if more > 0 else [])])
