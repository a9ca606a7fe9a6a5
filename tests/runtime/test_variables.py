"""Garbage in any variable that dsmoe reads as a number or an address is one clear error, and never a traceback."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from dsmoe.config import Config
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Cluster
from dsmoe.launch import attempts
from dsmoe.runtime.container import rank_environments
from dsmoe.runtime.launchers import LAUNCHERS, WITHOUT_SIZE, rank_from_variables
from dsmoe.runtime.rendezvous import is_whole_number
from dsmoe.runtime.reporting_rank import reports_for_host, reports_for_job
from dsmoe.runtime.variables import LauncherError, check_address, whole_number
from dsmoe.runtime.world import check_rendezvous, launched_world, set_rank_variables
from tests.runtime.test_launchers import others
from tests.runtime.test_world import DEEPSPEED, TORCHRUN, step

WHERE = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
NUMBERS = (
    *("abc", "", " ", "-1", "+1", "1.0", "1e3", "0x10", "1 2", "1,2", "1_0", "٣", "²", "None", "nan", "inf"),
    *("9" * 19, "9" * 5000, "1\n2", "$(id)", "a[$(id)]", "\x00"[:0] + "\udcff", "🙂", "x" * 100_000),
)
ADDRESSES = ("", " ", "a b", "..", "a..b", "x" * 64, "x" * 5000, "node1\n", "\udcff", "\ud800.example")
LISTS = ("", " ", "n[", "n[1-", "n[9-1]", "n[1-99999999]", "$(id)", "n[" + "9" * 5000 + "]", "\udcff", "n[٣]", ",")
LAYOUTS = ("", "2(x", "2(x2", "x", "٣", "9" * 5000, "2(x" + "9" * 5000 + ")", "2,,2", "-1")
GARBAGE = {"MASTER_ADDR": ADDRESSES, "SLURM_STEP_NODELIST": LISTS, "SLURM_STEP_TASKS_PER_NODE": LAYOUTS}
NEITHER = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "SLURM_STEP_ID", "PMIX_NAMESPACE")
"""Of the environments here, what is never read as a number."""


def read(environment: Mapping[str, str]) -> None:
    """Read all variables that are read before the ranks join."""
    given = dict(environment)
    set_rank_variables(given)
    world = launched_world(given)
    if world.size > 1:
        check_rendezvous(given)


def read_in_container(environment: Mapping[str, str]) -> None:
    rank_environments(TWO_NODES, environment)


TWO_NODES = Config.model_construct(cluster=Cluster(nodes=2, devices_per_node=2, device="cpu"))
CONTAINER = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
PODS = {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "node0"}
SRUN = {name: value for name, value in step(1).items() if not name.startswith(("SLURM_NTASKS", "SLURM_JOB_N"))}


def environments_read() -> Iterator[tuple[str, dict[str, str], tuple[str, ...], Callable[[Mapping[str, str]], None]]]:
    """Each launcher's environment, which of its variables are read, and by what."""
    yield "torchrun", {**TORCHRUN, **WHERE}, (), read
    yield "deepspeed", {**DEEPSPEED, **WHERE}, (), read
    yield "srun", {**SRUN, "SLURM_RESTART_COUNT": "2"}, ("SLURM_TASKS_PER_NODE",), read
    yield "a container of several", CONTAINER, ("MASTER_ADDR",), read_in_container
    yield "a pod of several", PODS, ("MASTER_ADDR",), read_in_container
    for launcher in LAUNCHERS:
        names = {launcher.rank, *launcher.size[:1], *launcher.local_rank[:1], *(launcher.local_size[:1])} | set(WHERE)
        names |= {launcher.nodes} if launcher.nodes else set()
        environment = {name: value for name, value in others(1)[launcher.name].items() if name in names}
        yield launcher.name, {**environment, **WHERE}, (), read
    for name in WITHOUT_SIZE:
        yield name, {name: "1"}, (name,), read


CASES = [
    (where, name, environment, look)
    for where, environment, unread, look in environments_read()
    for name in environment
    if name not in NEITHER and name not in unread
]


def refusal(look: Callable[[Mapping[str, str]], None], environment: dict[str, str], name: str) -> str:
    with pytest.raises(UserError) as error:
        look(environment)
    text = str(error.value)
    assert name in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize(("where", "name", "environment", "look"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_garbage_is_refused_by_name(
    where: str, name: str, environment: dict[str, str], look: Callable[[Mapping[str, str]], None]
) -> None:
    look(environment)  # which is right
    for value in GARBAGE.get(name, NUMBERS):
        if value.strip() or name in ("RANK", "WORLD_SIZE", "NODE_RANK"):  # an empty one is often one that is not set
            text = refusal(look, {**environment, name: value}, name)
            assert repr(value)[1:10] in text, (where, text)


def fuzz(count: int) -> tuple[int, int]:
    """Return the number of environments refused, and read; anything else is an error."""
    choose = random.Random(7)
    refused = taken = 0
    pieces = [
        "0",
        "1",
        "7",
        "-",
        " ",
        "a",
        "[",
        "]",
        "(x",
        ")",
        ",",
        "$",
        "\n",
        "٣",
        "🙂",
        "\udcff",
        "9" * 30,
        "'",
        '"',
    ]
    for _ in range(count):
        _, name, environment, look = choose.choice(CASES)
        value = "".join(choose.choices(pieces, k=choose.randint(0, 6)))
        changed = {**environment, name: value}
        if choose.random() < 0.3:
            changed.pop(choose.choice(list(changed)))
        reports_for_job(changed)
        assert is_whole_number(rank_from_variables(changed))
        try:
            look(changed)
        except UserError as error:
            refused += 10 < len(str(error)) < 1500  # one clear message
        else:
            taken += 1
    assert refused + taken == count
    return refused, taken


def test_any_text_in_any_of_them_is_read_or_refused() -> None:
    refused, taken = fuzz(1500)
    assert refused > 1000
    assert taken > 20


@pytest.mark.fuzz
def test_any_text_in_any_of_them_is_read_or_refused_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    refused, taken = fuzz(50_000)
    with capsys.disabled():
        print(f"{refused} refused, {taken} read")
    assert refused > 30_000


@pytest.mark.parametrize("value", NUMBERS)
def test_the_one_function_takes_digits_and_nothing_else(value: str) -> None:
    assert not is_whole_number(value)
    with pytest.raises(LauncherError, match=r"^ANY is .*, and is to be a whole number from 0 on; set it right"):
        whole_number({"ANY": value}, "ANY", "set it right")
    assert whole_number({"ANY": " 007\n"}, "ANY") == 7


@pytest.mark.parametrize(
    "value", ["node1", "10.0.0.1", "::1", "fe80::1%eth0", "bücher.example", "n1.example.", "A-b_c"]
)
def test_an_address_that_may_be(value: str) -> None:
    check_address({"MASTER_ADDR": value}, "MASTER_ADDR")


@pytest.mark.parametrize("value", NUMBERS)
def test_whether_a_job_is_queued_again_needs_no_right_variables(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["attempts", str(tmp_path / "none"), "1"])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    except ValueError:
        pytest.skip("no environment has that")
    assert attempts.main() == 1, "it cannot be counted how often"
    assert "SLURM_RESTART_COUNT is " in capsys.readouterr().out


@pytest.mark.parametrize("value", ["abc", "\udcff", "x" * 5000])
def test_the_reporting_rank_is_known_whatever_the_variables_are(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoe.runtime.reporting_rank._bound", [])
    monkeypatch.setenv("RANK", value)
    assert reports_for_host(os.environ)
