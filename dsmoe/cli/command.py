"""Entry point of the `dsmoe` command. Exit codes: 0 done, 2 a person has to change something, 1 anything else."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from dsmoe import __version__
from dsmoe.cli import checkpoint_commands, config_commands, launch_commands, preparation_commands
from dsmoe.config import UserError
from dsmoe.config.errors import describe, exit_code_of, located
from dsmoe.exit_codes import DONE, FAILED, INTERRUPTED
from dsmoe.runtime.reporting_rank import print_once_per_host
from dsmoe.runtime.standard_streams import flush_streams, open_missing_streams
from dsmoe.runtime.start import Parser, UsageError, begin_failed

# No module in cli/ imports torch at its top, so that `dsmoe config` and `dsmoe plan` answer at once, also on a login
# node. A command that needs torch imports it when it runs.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` defaults to the arguments of the process."""
    open_missing_streams()
    parser = _parser()
    try:
        # argparse takes no overrides after an option: they come back as unknown arguments.
        arguments, rest = parser.parse_known_args(argv)
        if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except UsageError as error:
        sys.exit(_report_wrong_arguments(error))
    if rest:
        arguments.overrides += rest
    try:
        code = arguments.run(arguments) or DONE
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe (`| head`)
        flush_streams()
        return FAILED
    except UserError as error:
        print_once_per_host(f"error: {error}")  # under a launcher all ranks of a host have the same input
        return exit_code_of(error)
    except OSError as error:
        is_of_output = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        print_once_per_host(
            f"error: standard output: {describe(error)}" if is_of_output else f"error: {located(error)}"
        )
        flush_streams()
        return exit_code_of(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dsmoe", description="Pretrain Mixture-of-Experts language models on DeepSpeed from one YAML file."
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        config_commands,
        launch_commands,
        preparation_commands,
        checkpoint_commands,
    ):  # the order of `--help`
        module.add_commands(commands)
    return parser


def _report_wrong_arguments(error: UsageError) -> int:
    """Report wrong arguments on one of the ranks and return the exit code."""
    code = begin_failed(error).ended()
    if code is None:  # rank 0 has valid arguments, and waits for this rank
        from dsmoe.runtime.failure_exit import report_failure

        code = report_failure(error)
    return code
