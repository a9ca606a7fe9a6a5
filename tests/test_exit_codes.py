"""Every exit code has one name, in one place, from which code and the scripts that we write take it."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dsmoe import exit_codes
from dsmoe.config.errors import HostError, PassingError, UserError, exit_code_of
from tests.helpers.sources import REPOSITORY, sources

FOLDERS = ("dsmoe", "launch", "docker", "benchmarks")
ENDINGS = {"exit", "_exit", "SystemExit"}
RARE = {exit_codes.STOPPED, exit_codes.INTERRUPTED}
"""Integers that are nothing else here than exit codes."""
IN_SCRIPT = re.compile(r"\bexit(?:s|ed)? (?:with )?[0-9]|\b(?:exit )?code=[0-9]|\bcode == [0-9]")


def literal_codes(text: str) -> Iterator[str]:
    """Where code has the number of an exit code, and where a script in it has."""
    tree = ast.parse(text)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ENDINGS & {getattr(node.func, "attr", ""), getattr(node.func, "id", "")}:
            yield from (ast.unparse(node) for given in node.args if is_integer(given))
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_integer(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (ast.unparse(node) for target in targets if re.search(r"code\b", ast.unparse(target)))
        if isinstance(node, ast.FunctionDef) and returns_code(node):
            yield from (ast.unparse(inner) for inner in ast.walk(node) if is_integer(returned(inner)))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in RARE:
            yield str(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from IN_SCRIPT.findall(node.value)


def is_integer(node: ast.AST | None) -> bool:
    """Whether it is a number as it stands there, or a choice that has one."""
    if isinstance(node, ast.IfExp):
        return is_integer(node.body) or is_integer(node.orelse)
    return isinstance(node, ast.Constant) and type(node.value) is int


def returns_code(function: ast.FunctionDef) -> bool:
    """Whether what a function returns is an exit code, by its name or by what it says."""
    return function.name == "main" or "exit code" in (ast.get_docstring(function) or "").lower().replace("\n", " ")


def returned(node: ast.AST) -> ast.AST | None:
    """What a statement returns."""
    return node.value if isinstance(node, ast.Return) else None


def test_no_other_module_has_the_numbers() -> None:
    found = {name: [*literal_codes(text)] for name, text in sources(*FOLDERS).items()}
    others = {name: codes for name, codes in found.items() if codes and name != "dsmoe/exit_codes.py"}
    assert not others, others


@pytest.mark.parametrize(
    "text",
    [
        "sys.exit(2)",
        "os._exit(0)",
        "raise SystemExit(1)",
        "class A:\n    exit_code = 2",
        "code: int = 1",
        "def main():\n    return 0",
        "def f():\n    '''Run; returns the exit\n    code.'''\n    return DONE if x else 1",
        "STOPPED = 75",
        "SCRIPT = 'if x; then exit 2; fi'",
        "SCRIPT = 'code=1'",
    ],
)
def test_however_they_are_written(text: str) -> None:
    assert len([*literal_codes(text)]) == 1
    right = "sys.exit(code)\nexit_code = DONE\nSCRIPT = 'exit {user_error}'"
    assert not [*literal_codes(f"def f():\n    '''Exit with 75.'''\n    return 0\n{right}")]


def test_what_others_go_by_is_what_it_was() -> None:
    assert (exit_codes.DONE, exit_codes.FAILED, exit_codes.USER_ERROR) == (0, 1, 2)
    assert exit_codes.STOPPED == os.EX_TEMPFAIL
    assert exit_codes.INTERRUPTED == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_is_what_a_shell_makes_of_it(number: signal.Signals) -> None:
    script = f'bash -c "kill -{number.name[3:]} \\$\\$"; echo $?'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False).stdout
    assert exit_codes.of_signal(number) == int(said)


def test_a_missing_program_is_what_a_shell_makes_of_it() -> None:
    command = ["bash", "-c", "no-such-program-anywhere"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == exit_codes.NO_PROGRAM


def test_errors_have_them() -> None:
    assert exit_code_of(UserError("x")) == exit_codes.USER_ERROR
    assert {exit_code_of(error) for error in (HostError("x"), PassingError("x"), KeyError("x"))} == {exit_codes.FAILED}


def test_they_are_known_without_any_other_package() -> None:
    command = [sys.executable, "-S", "-c", "import dsmoe.exit_codes"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0
