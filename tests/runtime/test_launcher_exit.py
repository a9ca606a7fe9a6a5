"""The launchers of a rank are found in real chains of small processes, and the rank stops when one has ended."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dsmoe.runtime import launcher_exit
from dsmoe.runtime.launcher_exit import Process
from dsmoe.runtime.rendezvous import AGENT_VARIABLES
from tests.helpers.ports import free_port
from tests.helpers.waiting import until
from tests.train.test_run import write_config

REPOSITORY = Path(__file__).parents[2]

LINK = """
import json, os, subprocess
(command, variables), *rest = json.loads(os.environ["CHAIN"])
subprocess.run(command, env={**os.environ, **variables, "CHAIN": json.dumps(rest)})
"""
"""A process of the chain: starts the next, and waits for it."""
RANK = """
import json, os, signal, sys, time
from dsmoe.runtime import launcher_exit
launcher_exit.POLL_SECONDS = 0.02
if "TELLS" in os.environ:
    def told(*_):
        print("told", flush=True)
        os._exit(75)
    signal.signal(signal.SIGTERM, told)
launcher_exit.watch_launcher()
launchers = launcher_exit.launchers_of(os.environ)
print(json.dumps([[process.program, process.number] for process in launchers]), flush=True)
time.sleep(600)
"""

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "0"}
DEEPSPEED = {"CROSS_SIZE": "1", "RANK": "3", "LOCAL_RANK": "0"}
ALONE: dict[str, str] = {}
OTHER = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}

PYTHON = [sys.executable, "-u"]
WHOSE = f"--world_info=of{os.getpid()}"
"""So that chains of other tests are not taken for this one's."""
LAUNCH = [*PYTHON, "-m", "deepspeed.launcher.launch", WHOSE]
BY_SHELL = ["bash", "-c", f"cd .; {shlex.join(LAUNCH)}; true"]
"""As ssh starts LAUNCH, in a shell that stays."""


def script(name: str) -> list[str]:
    return [*PYTHON, f"bin/{name}"]


def titled(title: str, argument: str = "") -> list[str]:
    """A process that shows another command than it was started with, as daemons do."""
    return ["bash", "-c", f'exec -a "{title}" {shlex.quote(sys.executable)} -c "$LINK" {argument}']


CHAINS: dict[str, tuple[list[list[str]], dict[str, str], list[str]]] = {
    "torchrun": ([script("job"), script("torchrun")], TORCHRUN, ["torchrun"]),
    "python alone": ([script("job")], ALONE, []),
    "a script that set RANK": ([script("job")], OTHER, []),
    "deepspeed": (
        [script("job"), script("deepspeed"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "deepspeed"],
    ),
    "deepspeed by its module": (
        [script("job"), [*PYTHON, "-m", "deepspeed.launcher.runner"], LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "deepspeed.launcher.runner"],
    ),
    "deepspeed over ssh": (
        [titled("sshd: /usr/sbin/sshd [listener]"), titled("sshd: me@notty"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "sshd"],
    ),
    "deepspeed over ssh, by a shell that stays": (
        [titled("sshd-session: me@notty"), BY_SHELL],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "bash", "sshd-session"],
    ),
    "deepspeed, here, over ssh": (
        [script("deepspeed"), titled("pdsh", WHOSE), titled("sshd: me@notty"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "sshd", "deepspeed"],
    ),
    "another deepspeed over ssh": (
        [script("deepspeed"), titled("pdsh", f"{WHOSE}0"), titled("sshd: me@notty"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "sshd"],
    ),
    "launch.py in a shell over ssh": (
        [titled("sshd: me@pts/0"), titled("-bash"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch"],
    ),
    "deepspeed in a shell over ssh": (
        [titled("sshd: me@notty"), script("deepspeed"), LAUNCH],
        DEEPSPEED,
        ["deepspeed.launcher.launch", "deepspeed"],
    ),
    "mpirun": ([script("job"), script("mpirun")], OTHER, ["mpirun"]),
    "mpirun of deepspeed": ([script("deepspeed"), script("mpirun")], OTHER, ["mpirun", "deepspeed"]),
    "srun": ([titled("slurmstepd: [7.0]")], {"SLURM_PROCID": "3"}, ["slurmstepd"]),
    "the image's entry point": ([script("entrypoint.py")], OTHER, ["entrypoint.py"]),
}  # fmt: skip


class Chain:
    """`commands`, each of which starts the next; the last starts a rank with `variables`, and then all is told."""

    def __init__(self, folder: Path, commands: Sequence[list[str]], variables: dict[str, str]) -> None:
        for name in ("deepspeed", "torchrun", "mpirun", "entrypoint.py", "job"):
            _write(folder / "bin" / name, LINK)
        for name in ("__init__", "launcher/__init__", "launcher/launch", "launcher/runner"):
            _write(folder / "deepspeed" / f"{name}.py", "" if name.endswith("__init__") else LINK)
        links: list[tuple[list[str], dict[str, str]]] = [(command, {}) for command in commands]
        links.append(([*PYTHON, "-c", RANK], variables))
        known = {
            name: value for name, value in os.environ.items() if name not in {*AGENT_VARIABLES, "RANK", "LOCAL_RANK"}
        }
        environment = {
            **known,
            "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
            "LINK": LINK,
            "PYTHONHOME": sys.base_prefix,  # Python looks for its library by the name that it shows
            "CHAIN": json.dumps(links[1:]),
        }
        pipe: Any = subprocess.PIPE
        self.first = subprocess.Popen(
            links[0][0], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
        )
        assert self.first.stdout is not None
        self.launchers: list[tuple[str, int]] = json.loads(self.first.stdout.readline())

    def end(self) -> tuple[str, str]:
        """The rank's standard output and error, once all processes have ended."""
        return self.first.communicate(timeout=60)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        for number in _below(self.first.pid):
            os.kill(number, signal.SIGKILL)
        self.end()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _below(number: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{number}/task/{number}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [number, *(below for child in children for below in _below(int(child)))]


@pytest.mark.parametrize("case", CHAINS)
def test_the_launchers_of_a_rank_are_known(case: str, tmp_path: Path) -> None:
    commands, variables, expected = CHAINS[case]
    with Chain(tmp_path, commands, variables) as chain:
        assert [program for program, _ in chain.launchers] == expected


def test_a_script_between_torchrun_and_the_rank_is_one_of_them(tmp_path: Path) -> None:
    told = ["env", *(f"{name}={value}" for name, value in TORCHRUN.items()), *script("job")]
    with Chain(tmp_path, [script("torchrun"), told], {}) as chain:
        assert [program for program, _ in chain.launchers] == ["job", "torchrun"]


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_is_told_when_one_of_them_has_gone(killed: int, tmp_path: Path) -> None:
    commands = [titled("sshd: me@notty"), BY_SHELL]
    with Chain(tmp_path, commands, {**DEEPSPEED, "TELLS": ""}) as chain:
        program, process = chain.launchers[killed]
        os.kill(process, signal.SIGKILL)
        out, err = chain.end()
    assert out == "told\n"
    assert f"the launcher has gone ({program}, process {process}); its ranks are told to stop" in err


def test_one_rank_of_a_host_says_so_and_sigterm_ends_those_that_do_not_train_yet(tmp_path: Path) -> None:
    with Chain(tmp_path, [script("torchrun")], {**TORCHRUN, "LOCAL_RANK": "1"}) as chain:
        os.kill(chain.first.pid, signal.SIGKILL)
        assert chain.end() == ("", "")


@contextmanager
def sleeping(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the test, however that ends."""
    with subprocess.Popen([program, "600"]) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_process_that_has_stopped_is_there_and_a_zombie_has_gone() -> None:
    with sleeping("sleep") as child:
        # Popen is back as soon as the program is loaded, a moment before its arguments are there to read.
        until(lambda: next(launcher_exit._ancestors(child.pid)).command == ("sleep", "600"))
        process = next(launcher_exit._ancestors(child.pid))
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: launcher_exit._status(child.pid)[0] == "T")
        assert not process.has_gone()
        os.kill(child.pid, signal.SIGKILL)
        until(process.has_gone)  # the kernel has ended it
        assert Path(f"/proc/{child.pid}").exists(), "nobody has waited for it"
    assert process.has_gone()


def test_a_name_with_brackets_is_one_name(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    shutil.copy(str(shutil.which("sleep")), program)
    with sleeping(str(program)) as child:
        until(lambda: Path(f"/proc/{child.pid}/comm").read_text(encoding="utf-8") == f"{program.name}\n")
        process, parent = islice(launcher_exit._ancestors(child.pid), 2)
        assert (process.has_gone(), parent.number) == (False, os.getpid())


def test_a_number_that_was_given_to_another_process_is_not_taken_for_it() -> None:
    itself = next(launcher_exit._ancestors(os.getpid()))
    assert not itself.has_gone()
    assert Process(itself.number, str(int(itself.started) - 1)).has_gone()


def test_what_cannot_be_read_now_has_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    itself = next(launcher_exit._ancestors(os.getpid()))

    def fail(_: int) -> tuple[str, int, str]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(launcher_exit, "_status", fail)
    assert not itself.has_gone()


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (("/usr/bin/python3.11", "-u", "/opt/bin/torchrun", "--nnodes", "2"), "torchrun"),
        (("python", "-m", "torch.distributed.run", "x.py"), "torch.distributed.run"),
        (("sshd: root@notty",), "sshd"),
        (("slurmstepd: [2.extern]", ""), "slurmstepd"),
        (("/usr/bin/bash", "deepspeed"), "bash"),
        (("python3",), "python3"),
        ((), ""),
    ],
)
def test_the_program_of_a_command(command: tuple[str, ...], program: str) -> None:
    assert Process(1, "1", command).program == program


def test_the_parent_of_a_namespaces_first_process_is_nobody() -> None:
    assert list(launcher_exit._ancestors(0)) == []


def test_without_proc_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int | str) -> tuple[str, int, str]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(launcher_exit, "_status", fail)
    assert launcher_exit.launchers_of(TORCHRUN) == []


@pytest.mark.parametrize("program", ["pretrain", "preflight"])
def test_a_rank_that_waits_for_others_ends_with_its_launcher(program: str, tmp_path: Path) -> None:
    _write(tmp_path / "torchrun", LINK)
    config = write_config(tmp_path, ranks=2)
    command = [*PYTHON, str(REPOSITORY / "launch" / f"{program}.py"), "--config", str(config)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = {**os.environ, "CHAIN": json.dumps([(command, {**TORCHRUN, **meeting, "RANK": "0"})])}
    with subprocess.Popen(
        [*PYTHON, str(tmp_path / "torchrun")], env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as launcher:
        ranks: list[int] = []

        def watches() -> bool:
            ranks[:] = _below(launcher.pid)[1:]
            return any(len(os.listdir(f"/proc/{rank}/task")) > 1 for rank in ranks)  # its second thread is the watch

        try:
            until(watches)
            launcher.kill()
            _, said = launcher.communicate(timeout=150)  # until nobody has its standard error
        finally:
            launcher.kill()
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
    assert said.splitlines()[-1].endswith("its ranks are told to stop (SIGTERM)"), said


@pytest.mark.parametrize(
    ("first", "variables", "gone"),
    [
        ("/sbin/init", TORCHRUN, True),
        ("/usr/bin/tini", DEEPSPEED, True),
        ("/usr/bin/python3.11", TORCHRUN, False),  # torchrun is the first process of a container
        ("/sbin/init", OTHER, False),
        ("/sbin/init", ALONE, False),
    ],
)
def test_an_agent_that_had_gone_before_its_rank_began(
    first: str, variables: dict[str, str], gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_exit, "_ancestors", lambda _: iter([Process(1, "5", (first, "torchrun"))]))
    monkeypatch.setattr(launcher_exit, "_has_variables", lambda *_: False)
    assert any(process.has_gone() for process in launcher_exit.launchers_of(variables) if process.number == 0) is gone
