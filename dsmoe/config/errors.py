"""The two exceptions that say the user's input is wrong, so that every command reports it without a traceback."""

from __future__ import annotations

from collections.abc import Iterable

Problem = tuple[str, str]
"""The dotted key that a problem is about, for its place in the file, and the message."""

_MOST_SHOWN = 50


class UserError(ValueError):
    """The input is wrong and the message says how to put it right; commands print it and exit with code 2."""


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
