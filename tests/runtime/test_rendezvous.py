"""Launchers' variables are read in runtime/ alone, and are the same for every reader."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.run as torchrun

from dsmoe.runtime.launchers import LAUNCHERS, WITHOUT_SIZE
from dsmoe.runtime.rendezvous import Rendezvous, slurm_attempt
from dsmoe.runtime.world import override_outer_local_rank
from tests.helpers.sources import REPOSITORY, sources

READERS = ("rendezvous.py", "world.py", "launchers.py", "container.py")
"""In dsmoe/runtime: torch's variables, Slurm's, those of launchers that know neither, and those of a container."""
TORCHS = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "NNODES", "JOB_COMPLETION_INDEX"),
}
PREFIXES = (
    *("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "CROSS_", "GROUP_", "ROLE_", "MASTER_", "MPI_", "MV2_"),
    *("FLUX_", "PALS_", "JSM_", "HOROVOD_", "ALPS_", "MPIRUN_"),
)
OF_LAUNCHERS = {
    name
    for each in LAUNCHERS
    for name in (each.rank, *each.size, *each.local_rank, *each.local_size, each.nodes)
    if name
} | WITHOUT_SIZE.keys()


def is_of_launcher(name: object) -> bool:
    """Return whether a launcher sets a variable of that name."""
    return isinstance(name, str) and (name in TORCHS or name in OF_LAUNCHERS or name.startswith(PREFIXES))


def names_in(text: str) -> Iterator[str]:
    """The names of launchers' variables that code has as strings or as keywords, and not in a longer text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and is_of_launcher(node.value) and node.value.isidentifier():
            yield node.value
        if isinstance(node, ast.keyword) and is_of_launcher(node.arg):
            yield str(node.arg)


def test_no_other_module_has_the_names_of_launchers_variables() -> None:
    found = {name: [*names_in(text)] for name, text in sources("dsmoe", "launch", "docker").items()}
    readers = {f"dsmoe/runtime/{name}" for name in READERS}
    assert {name for name, names in found.items() if names} == readers


@pytest.mark.parametrize(
    "text",
    [
        "os.environ['RANK']",
        "os.environ.get('SLURM_JOB_ID', '')",
        "'MASTER_ADDR' in environment",
        "whole_number(environment, 'PMI_SIZE')",
        "os.environ.update(WORLD_SIZE='1')",
    ],
)
def test_however_they_are_looked_up(text: str) -> None:
    assert len([*names_in(text)]) == 1
    assert not [*names_in("os.environ['HF_HOME'], print('RANK is 3 (SLURM_JOB_ID)'), MASTER_PORT")]


def test_what_is_said_is_read_and_said_again() -> None:
    said = Rendezvous(5, 1, 8, 4, "node07", 29500, is_launched=True, is_host_leader=False)
    variables = said.variables()
    assert variables == {
        **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "node07", "MASTER_PORT": "29500"},
    }
    assert Rendezvous.from_environment(variables) == said
    assert said.complete() == (5, 8, "node07", 29500)
    assert said.endpoint == "node07:29500"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_that_is_not_told_all_is_not_complete(name: str) -> None:
    variables = Rendezvous(5, 1, 8, 4, "node07", 29500).variables()
    del variables[name]
    assert Rendezvous.from_environment(variables).complete() is None


def test_what_is_no_number_is_not_set() -> None:
    garbage = Rendezvous.from_environment(
        {"RANK": "one", "WORLD_SIZE": "9" * 5000, "MASTER_PORT": "", "LOCAL_RANK": "-1"}
    )
    assert (garbage.rank, garbage.size, garbage.port, garbage.local_rank) == (None, None, None, None)
    assert garbage.is_launched
    assert Rendezvous.from_environment({}) == Rendezvous()


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "3"}, True),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_LOCALID": "0"}, True),
        ({"SLURM_LOCALID": "3"}, False),
    ],
)
def test_the_first_of_a_host_is_known_under_srun_as_well(environment: dict[str, str], is_first: bool) -> None:
    assert Rendezvous.from_environment(environment).is_host_leader is is_first


def test_it_is_read_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert Rendezvous.from_environment().rank == 3
    monkeypatch.setenv("RANK", "4")
    assert Rendezvous.from_environment().rank == 4


def test_what_torchrun_sets_is_read(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(
        "import os\n"
        "from dsmoe.runtime.rendezvous import Rendezvous\n"
        "own = Rendezvous.from_environment()\n"
        "assert own.complete()[2:] == (own.address, own.port) and own.port > 0\n"
        "line = f'{own.rank} {own.local_rank} {own.size} {own.local_size} {own.restart}\\n'\n"
        "os.write(1, line.encode())\n",  # in one piece: both ranks write to one pipe
        encoding="utf-8",
    )
    command = [sys.executable, "-m", torchrun.__name__, "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False)
    assert sorted(done.stdout.splitlines()) == ["0 0 2 2 0", "1 1 2 2 0"], done.stderr


def test_an_outer_mpirun_is_made_to_agree() -> None:
    environment = {"OMPI_COMM_WORLD_LOCAL_RANK": "7", "LOCAL_RANK": "1"}
    override_outer_local_rank(1, environment)
    assert environment["OMPI_COMM_WORLD_LOCAL_RANK"] == "1"
    alone: dict[str, str] = {}
    override_outer_local_rank(1, alone)
    assert alone == {}


def test_attempts_of_slurm_are_as_they_are_written() -> None:
    assert slurm_attempt({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "x"}) == ("12", "x")
    assert slurm_attempt({}) == ("no job", "0")


def test_it_is_read_without_any_other_package() -> None:
    command = [sys.executable, "-S", "-c", "import dsmoe.runtime.rendezvous"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0
