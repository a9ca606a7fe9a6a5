"""Exceptions that every command reports as one message without a traceback, and the exit code of each."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from dsmoe.exit_codes import FAILED, USER_ERROR

Problem = tuple[str, str]
"""The dotted key of a problem, from which its place in the file follows, and the message."""

_MOST_SHOWN = 50


class UserError(ValueError):
    """Wrong input, with a message that says how to put it right; commands print the message and exit with code 2."""

    exit_code = USER_ERROR


class HostError(UserError):
    """A problem of this host that other hosts may not have."""

    exit_code = FAILED


class PassingError(UserError):
    """A problem that may be gone at the next try: a held lock, a full disk, storage that does not answer."""

    exit_code = FAILED


class ExplainedError(RuntimeError):
    """The end of a run without a mistake in its input; commands print the message without a traceback."""


def refuse(problems: Iterable[Problem]) -> None:
    """Raise the problems of a constructor's arguments, with the sections' names taken out of the keys.

    `moe.top_k (9) must be at most moe.num_experts (8)` becomes `top_k (9) must be at most num_experts (8)`.

    Raises:
        UserError: there are problems; one line for each.
    """
    messages = [re.sub(r"\b(cluster|parallel|model|moe)\.(?=[a-z])", "", message) for _, message in problems]
    if messages:
        raise UserError("\n".join(messages))


_LASTING_ERRORS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    }
)
"""Errors of the system that last until somebody changes a path or a permission.

All others may pass by themselves: too many open files, a stale handle, no memory, a lost connection. So may a full disk
or quota, because other jobs that share it end and their files are removed.
"""


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that ends with the error: 2 if a person has to change something, else 1."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return USER_ERROR if error.errno in _LASTING_ERRORS else FAILED
    return FAILED


def system_error(message: str, error: OSError) -> UserError:
    """Return an error with this message and with the exit code of the system's error."""
    return UserError(message) if exit_code_of(error) == UserError.exit_code else PassingError(message)


def describe(error: OSError) -> str:
    """Return `/data/a.txt: No space left on device`, or the part that is known; both names for a failed rename."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {reason}" if names else reason


def located(error: OSError) -> str:
    """Return `describe(error)` with the line of dsmoe that raised it: `... (dsmoe/data/cache.py:52)`."""
    place = getattr(error, "place", None) or _place(error)
    return f"{describe(error)} ({place})" if place else describe(error)


def keep_place(error: Exception, where: str) -> None:
    """Record in the error where it was raised, because sending it to another process loses the traceback.

    Args:
        error: changed in place; `located` and a printed traceback then show the record.
        where: the process, for the message.
    """
    if isinstance(error, UserError):
        return
    if place := _place(error):
        error.place = f"{place}, {where}"  # type: ignore[attr-defined]
    error.add_note(f"raised {where}:\n{''.join(traceback.format_tb(error.__traceback__)).rstrip()}")


def _place(error: BaseException) -> str | None:
    """Return the last line of dsmoe in the error's traceback; None without one."""
    package = Path(__file__).parents[1]
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    in_dsmoe = [f"{file.relative_to(package.parent)}:{line}" for file, line in lines if file.is_relative_to(package)]
    return in_dsmoe[-1] if in_dsmoe else None


class ConfigError(UserError):
    """All problems of one configuration.

    `problems` has one line per problem, each with its key and its place. `str()` is that line for a single problem,
    else a heading that names the loaded file, `source`, and an indented list.
    """

    def __init__(self, problems: Iterable[str], source: str) -> None:
        self.problems = list(problems)
        self.source = source
        # The constructor's arguments rather than the text, because unpickling calls the class with `args`.
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        heading = f"{len(self.problems)} problems in {self.source}:"
        shown = [f"  - {problem}" for problem in self.problems[:_MOST_SHOWN]]
        more = len(self.problems) - _MOST_SHOWN
        return "\n".join([heading, *shown, *([f"  ... and {more:,} more"] if more > 0 else [])])
