"""Who speaks is asked in one place, by one question each."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterator

import pytest

from dsmoe.runtime.reporting_rank import is_first_of_host, signed, speaks_for_job, speaks_of_jobs
from tests.helpers.sources import sources


def decisions(text: str) -> Iterator[str]:
    """Where code decides by itself by what launchers say of a rank, or signs what it says."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == "is_first_of_host":
            yield node.attr
        if isinstance(node, ast.Name) and node.id == "first_rank_known":
            yield node.id
        code = ast.unparse(node) if isinstance(node, ast.Compare | ast.JoinedStr) else ""
        if code.endswith(".local_rank == 0") or (code[2:].startswith("[rank {") and " on {" in code):
            yield code


def test_nobody_else_decides_who_speaks() -> None:
    deciding = {name for name, text in sources("dsmoe", "launch").items() if [*decisions(text)]}
    deciding.discard("dsmoe/preflight/judge/sameness.py")  # which looks at what ranks have reported
    assert deciding == {"dsmoe/runtime/reporting_rank.py"}


@pytest.mark.parametrize(
    "text",
    [
        "Rendezvous.from_environment().is_first_of_host",
        "here.local_rank == 0",
        "first_rank_known(os.environ)",
        "f'[rank {rank} on {platform.node()}] {text}'",
    ],
)
def test_however_it_is_decided(text: str) -> None:
    assert len([*decisions(text)]) == 1


@pytest.mark.parametrize(
    ("environment", "for_job", "first_of_host", "of_jobs"),
    [
        ({}, True, True, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, True, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False, False, True),
        ({"RANK": "5", "LOCAL_RANK": "1"}, False, False, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False, True, True),
        ({"RANK": "4"}, False, True, False),
    ],
)
def test_who_speaks(
    environment: dict[str, str],
    for_job: bool,
    first_of_host: bool,
    of_jobs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    answers = (speaks_for_job(), is_first_of_host(), speaks_of_jobs(int(environment.get("RANK", "0"))))
    assert answers == (for_job, first_of_host, of_jobs)


def test_what_is_said_for_a_rank_alone_has_its_name() -> None:
    assert signed(3, "no") == f"[rank 3 on {platform.node()}] no"
