"""The reporting rank is chosen in one module, by one function for each case."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterator

import pytest

from dsmoe.runtime.reporting_rank import is_host_leader, logs_progress, reports_for_job, signed
from tests.helpers.sources import sources


def decisions(text: str) -> Iterator[str]:
    """Code that chooses a reporting rank by launchers' variables, or puts a rank's name before a text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == "is_host_leader":
            yield node.attr
        if isinstance(node, ast.Name) and node.id == "rank_from_variables":
            yield node.id
        code = ast.unparse(node) if isinstance(node, ast.Compare | ast.JoinedStr) else ""
        if code.endswith(".local_rank == 0") or (code[2:].startswith("[rank {") and " on {" in code):
            yield code


def test_no_other_module_chooses_the_reporting_rank() -> None:
    deciding = {name for name, text in sources("dsmoe", "launch").items() if [*decisions(text)]}
    deciding.discard("dsmoe/preflight/judge/__init__.py")  # which looks at what ranks have reported
    assert deciding == {"dsmoe/runtime/reporting_rank.py"}


@pytest.mark.parametrize(
    "text",
    [
        "Rendezvous.from_environment().is_host_leader",
        "rendezvous.local_rank == 0",
        "rank_from_variables(os.environ)",
        "f'[rank {rank} on {platform.node()}] {text}'",
    ],
)
def test_however_it_is_decided(text: str) -> None:
    assert len([*decisions(text)]) == 1


@pytest.mark.parametrize(
    ("environment", "for_job", "is_leader", "logs"),
    [
        ({}, True, True, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, True, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False, False, True),
        ({"RANK": "5", "LOCAL_RANK": "1"}, False, False, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False, True, True),
        ({"RANK": "4"}, False, True, False),
    ],
)
def test_who_reports(
    environment: dict[str, str],
    for_job: bool,
    is_leader: bool,
    logs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    answers = (reports_for_job(), is_host_leader(), logs_progress(int(environment.get("RANK", "0"))))
    assert answers == (for_job, is_leader, logs)


def test_what_is_said_for_a_rank_alone_has_its_name() -> None:
    assert signed(3, "no") == f"[rank 3 on {platform.node()}] no"
