"""Errors of the command line and the config are printed once for all ranks, and before torch is imported."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.cli import preparation_commands
from dsmoe.config.errors import HostError, UserError
from dsmoe.runtime import reporting_rank, start
from dsmoe.runtime.start import Start, begin_command, load_on_host
from tests.helpers.ports import free_port
from tests.helpers.recipes import VALID
from tests.helpers.side_by_side import run_side_by_side
from tests.runtime.test_launchers import mpich, openmpi, without
from tests.runtime.test_world import step

REPOSITORY = Path(__file__).parents[2]
RANKS = 3
PRETRAIN, PREFLIGHT = (str(REPOSITORY / "launch" / f"{name}.py") for name in ("pretrain", "preflight"))
MISSING = "the following arguments are required: --config"


def torchs(rank: int) -> dict[str, str]:
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1"},
    }


def sruns(rank: int) -> dict[str, str]:
    return {**step(rank, nodes=1, per_node=RANKS), "MASTER_ADDR": "127.0.0.1"}


LAUNCHED = {
    "torch's names": torchs,
    "srun": sruns,
    "mpirun": lambda rank: openmpi(rank, RANKS, RANKS),
    "mpiexec": lambda rank: mpich(rank, RANKS, RANKS),
    "half of mpirun": lambda rank: without(openmpi(rank, RANKS, RANKS), "OMPI_COMM_WORLD_SIZE"),
    "RANK is no number": lambda rank: {**torchs(rank), "RANK": "one"},
}
RIGHT_LAUNCHERS = ("torch's names", "srun", "mpirun", "mpiexec")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a config of 8 ranks, and a torch that nobody can import without being seen."""
    (tmp_path / "config.yaml").write_text(VALID, encoding="utf-8")
    for name in ("torch", "deepspeed"):
        (tmp_path / "decoy" / name).mkdir(parents=True)
        (tmp_path / "decoy" / name / "__init__.py").write_text(
            f"import os, sys\nprint('{name} is imported', file=sys.stderr, flush=True)\nos._exit(99)\n",
            encoding="utf-8",
        )
    return tmp_path


def outcomes(folder: Path, launched: str, *command: str, port: str | None = None) -> tuple[list[int], str, str]:
    """The exit codes of the ranks, and all that they say."""
    kept = {"PATH", "HOME", "PYTHONPATH"}
    base = {name: value for name, value in os.environ.items() if name in kept}
    base["PYTHONPATH"] = f"{folder / 'decoy'}:{REPOSITORY}:{base.get('PYTHONPATH', '')}"
    port = free_port() if port is None else port
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**base, **LAUNCHED[launched](rank), "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(RANKS)
    ]
    texts = [process.communicate(timeout=100) for process in ranks]
    return [process.returncode for process in ranks], *("".join(text[which] for text in texts) for which in (0, 1))


WRONG = [
    ("torch's names", (PRETRAIN,), MISSING),
    ("torch's names", (PRETRAIN, "--config", "config.yaml", "--confg"), "unrecognized arguments: --confg"),
    ("torch's names", (PRETRAIN, "--config", "confg.yaml"), "error: no such file: confg.yaml"),
    ("torch's names", (PRETRAIN, "--config", "config.yaml", "moe.num_expert=8"), "did you mean 'num_experts'?"),
    ("torch's names", (PRETRAIN, "--config", "config.yaml"), "started 1 x 3 = 3 ranks, but cluster.nodes x"),
    ("srun", (PRETRAIN, "--config", "confg.yaml"), "error: no such file: confg.yaml"),
    ("srun", (PRETRAIN, "--config", "config.yaml"), "srun started 1 x 3 = 3 ranks, but cluster.nodes x"),
    ("mpirun", (PRETRAIN,), MISSING),
    ("mpirun", (PRETRAIN, "--config", "config.yaml"), "mpirun (Open MPI) started 1 x 3 = 3 ranks, but"),
    ("mpiexec", (PREFLIGHT, "--config", "config.yaml"), "mpiexec (MPICH) started 1 x 3 = 3 ranks, but"),
    ("torch's names", (PREFLIGHT, "--config", "confg.yaml"), "error: no such file: confg.yaml"),
    ("srun", ("-m", "dsmoe", "preflight", "config.yaml", "moe.num_expert=8"), "did you mean 'num_experts'?"),
    ("torch's names", ("-m", "dsmoe", "preflight"), "dsmoe preflight: error: the following arguments are required"),
    ("mpirun", ("-m", "dsmoe", "parity", "confg.yaml", "--layouts", "dp=3"), "error: no such file: confg.yaml"),
    ("mpirun", ("-m", "dsmoe", "parity", "config.yaml", "--layouts", "dpp=3"), "there is no key dpp"),
]


@pytest.mark.parametrize(("launched", "command", "message"), WRONG)
def test_what_all_ranks_have_wrong_is_said_once_without_torch(
    launched: str, command: tuple[str, ...], message: str, folder: Path
) -> None:
    codes, out, err = outcomes(folder, launched, *command)
    assert codes == [2] * RANKS, err
    assert err.count(message) == 1, err
    assert err.count("error: ") == 1, err
    assert "is imported" not in err
    assert (out, "Traceback" in err) == ("", False)


@pytest.mark.parametrize("launched", RIGHT_LAUNCHERS)
@pytest.mark.parametrize("command", [(PRETRAIN, "--help"), ("-m", "dsmoe", "preflight", "--help")])
def test_help_is_printed_once_without_torch(launched: str, command: tuple[str, ...], folder: Path) -> None:
    codes, out, err = outcomes(folder, launched, *command)
    assert codes == [0] * RANKS, err
    assert (out.count("usage: "), err) == (1, "")


def test_what_is_right_goes_on_to_torch(folder: Path) -> None:
    """Else the decoy could not be seen."""
    right = ("cluster.nodes=1", f"cluster.devices_per_node={RANKS}", "parallel.expert=1", "train.batch_tokens=6144")
    codes, _, err = outcomes(folder, "srun", PRETRAIN, "--config", "config.yaml", "parallel.tensor=1", *right)
    assert codes == [99] * RANKS, err


@pytest.mark.parametrize(
    ("launched", "of_launcher", "command", "of_config"),
    [
        (
            "half of mpirun",
            "OMPI_COMM_WORLD_RANK is ",
            (PRETRAIN, "--config", "config.yaml", "moe.num_expert=8"),
            "did you mean 'num_experts'?",
        ),
        (
            "RANK is no number",
            "RANK is 'one', and is to be a whole number",
            ("-m", "dsmoe", "parity", "confg.yaml", "--layouts", "dp=3"),
            "no such file: confg.yaml",
        ),
    ],
)
def test_a_wrong_launcher_hides_no_other_error_and_one_rank_of_the_host_says_both(
    launched: str, of_launcher: str, command: tuple[str, ...], of_config: str, folder: Path
) -> None:
    codes, out, err = outcomes(folder, launched, *command, port="")
    assert codes == [2] * RANKS, err
    assert (err.count(of_config), err.count(of_launcher)) == (1, 1), err
    assert err.index(of_config) < err.index(of_launcher)
    assert (out, "Traceback" in err, "is imported" in err) == ("", False, False)


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"WORLD_SIZE": "3"}, "error: no such file: confg.yaml\nerror: WORLD_SIZE is 3, and nothing says which"),
        ({"RANK": "1"}, "[rank 1 on {host}] error: no such file: confg.yaml\nerror: RANK is 1, and WORLD_SIZE is not"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "3"}, "error: no such file: confg.yaml\nerror: RANK is '999"),
    ],
)
def test_both_errors_are_said_in_order(
    environment: dict[str, str],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    slept: list[float] = []
    monkeypatch.setattr(reporting_rank.time, "sleep", slept.append)
    monkeypatch.setattr(reporting_rank, "reports_for_host", lambda _: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert begin_command("confg.yaml", []).ended() == 2
    said = capsys.readouterr().err
    assert printed.format(host=platform.node()) in said
    assert len(said) < 1000
    assert slept == [reporting_rank.LINGER_SECONDS]


@pytest.mark.parametrize("arguments", [["parity", "confg.yaml", "--layouts", "dp=2"], ["preflight", "confg.yaml"]])
def test_every_command_of_several_ranks_watches_its_launcher(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    watched: list[bool] = []
    monkeypatch.setattr(start, "watch_launcher", lambda: watched.append(True))
    monkeypatch.setattr(preparation_commands, "exit_process", lambda code: None)
    cli.main(arguments)
    assert watched == [True]


FAILS = """
import sys
from dsmoe import cli
from dsmoe.cli import config_commands
config_commands._schema = lambda _: open("/none/such")
sys.exit(cli.main(["config", "schema"]))
"""


def test_an_error_of_the_system_is_said_once_with_its_line(folder: Path) -> None:
    codes, _, err = outcomes(folder, "torch's names", "-c", FAILS)
    assert codes == [2] * RANKS, err
    assert err.count("error: /none/such: No such file or directory (dsmoe/cli/command.py:") == 1, err
    assert len(err.splitlines()) == 1


def test_a_launcher_that_says_half_is_one_message(folder: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
    environment = {
        **kept,
        "PYTHONPATH": f"{folder / 'decoy'}:{REPOSITORY}",
        **without(openmpi(0), "OMPI_COMM_WORLD_SIZE"),
    }
    command = [sys.executable, PRETRAIN, "--config", "config.yaml"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: OMPI_COMM_WORLD_RANK is 0, and there is no OMPI_COMM_WORLD_SIZE")
    assert len(done.stderr.splitlines()) == 1


@contextmanager
def listening(word: bytes | None) -> Iterator[str]:
    """Rank 0's port: it says the word, or waits to be asked as torch's store does. Who is not asked fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(60)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(60)
                if word is None:
                    connection.recv(1)
                else:
                    connection.sendall(word)

        served = pool.submit(serve)
        yield str(server.getsockname()[1])
        served.result()


@pytest.mark.parametrize(
    ("word", "ended", "said"),
    [
        (start._answer("error: no such file: confg.yaml") + b"\2", 2, ""),
        (start._answer("error: another") + b"\2", 1, "[rank 1 on {host}] error: no such file: confg.yaml\n"),
        (None, None, ""),  # rank 0 is about to train: it is told through torch
    ],
    ids=["the same error", "another error", "none"],
)
def test_a_rank_with_an_error_asks_whether_rank_0_has_it(
    word: bytes | None,
    ended: int | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(word) as port:
        for name, value in {**torchs(1), "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        begun = begin_command("confg.yaml", [])
        assert begun.ended() == ended
    assert capsys.readouterr().err == said.format(host=platform.node())
    with pytest.raises(UserError, match="no such file"):
        _ = begun.plan


def test_a_rank_without_a_rendezvous_leaves_the_report_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(start.time, "sleep", slept.append)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    assert Start(start.argparse.Namespace(), None, UserError("srun has dealt the tasks out")).ended() == 2
    assert (slept, capsys.readouterr().err) == ([start.LINGER_SECONDS], "")


def test_a_file_that_is_wrong_is_for_a_person_and_one_that_is_missing_perhaps_of_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.yaml").write_text("name: 3\n", encoding="utf-8")
    for rank, name, kind in ((1, "wrong", UserError), (1, "none", HostError), (0, "none", UserError)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(UserError) as error:
            load_on_host(str(tmp_path / f"{name}.yaml"), [])
        assert type(error.value) is HostError if kind is HostError else not isinstance(error.value, HostError)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_is_one_line_and_130(rank: str) -> None:
    program = "from dsmoe.runtime.start import interruptible\nwith interruptible():\n    raise KeyboardInterrupt"
    environment = {**os.environ, "RANK": rank}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 130
    assert done.stderr == ("stopped by SIGINT, at once\n" if rank == "0" else "")


@pytest.mark.slow
def test_a_rank_whose_own_config_is_wrong_tells_rank_0(tmp_path: Path) -> None:
    """Which has a right one, and has imported torch meanwhile."""
    from tests.train.test_run import write_config

    config = write_config(tmp_path, ranks=2, expert=2, train={"steps": 2}, runs_dir="runs")
    port = free_port()
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    command = [sys.executable, str(PRETRAIN), "--config", str(config)]
    environments = [{**os.environ, **torchs(rank), **world} for rank in range(2)]
    codes, texts = run_side_by_side([command, [*command, "moe.num_expert=4"]], environments, tmp_path)
    assert codes == [2, 2], texts
    assert "error: 1 rank of 2 cannot start:\n  - rank 1 on " in texts[0]
    assert ": moe.num_expert: unknown key" in texts[0]
    assert "moe.num_expert" not in texts[1]
    assert "Traceback" not in texts[0] + texts[1]
