"""Launchers that know no torch: their variables become ranks, or are refused, and never as many runs of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.runtime.launchers import LAUNCHERS, launcher_port
from dsmoe.runtime.reporting_rank import reports_for_job
from dsmoe.runtime.variables import LauncherError
from dsmoe.runtime.world import World, check_rendezvous, launched_world, set_rank_variables
from tests.helpers.side_by_side import run_side_by_side
from tests.runtime.test_world import ALLOCATION, BATCH, TORCHRUN, config, refusal, step

WHERE = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def openmpi(rank: int, size: int = 8, local: int = 4) -> dict[str, str]:
    """Seen under `mpirun` of Open MPI 4.1.4."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "NODE_RANK")
    values = (rank, size, rank % local, local, rank % local)
    return {
        **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, values, strict=True)},
        **{"PMIX_RANK": str(rank), "PMIX_NAMESPACE": "1048510465", "OMPI_MCA_ess_base_vpid": str(rank)},
    }


def mpich(rank: int, size: int = 8, local: int = 4) -> dict[str, str]:
    """Seen under `mpiexec` of MPICH 4.0.2."""
    return {
        **{"PMI_RANK": str(rank), "PMI_SIZE": str(size), "PMI_FD": "6"},
        **{"MPI_LOCALRANKID": str(rank % local), "MPI_LOCALNRANKS": str(local)},
    }


def others(rank: int, size: int = 8, local: int = 4) -> dict[str, dict[str, str]]:
    """The variables of each launcher by its name, from its documentation."""
    r, s, lr, ls = (str(value) for value in (rank, size, rank % local, local))
    mvapich = {"MV2_COMM_WORLD_RANK": r, "MV2_COMM_WORLD_SIZE": s, "MV2_COMM_WORLD_LOCAL_RANK": lr}
    jsrun = {"JSM_NAMESPACE_RANK": r, "JSM_NAMESPACE_SIZE": s, "JSM_NAMESPACE_LOCAL_RANK": lr}
    return {
        "mpirun (Open MPI)": openmpi(rank, size, local),
        "mpiexec (MPICH)": mpich(rank, size, local),
        "mpirun_rsh (MVAPICH2)": {**mvapich, "MV2_COMM_WORLD_LOCAL_SIZE": ls},
        "mpiexec (PALS)": {
            **{"PALS_RANKID": r, "PALS_LOCAL_RANKID": lr, "PALS_NODEID": str(rank // local), "PALS_LOCAL_SIZE": ls},
            **{"PMI_RANK": r, "PMI_SIZE": s, "PMI_LOCAL_RANK": lr, "PMI_LOCAL_SIZE": ls},
        },
        "flux run": {
            **{
                "FLUX_TASK_RANK": r,
                "FLUX_JOB_SIZE": s,
                "FLUX_TASK_LOCAL_ID": lr,
                "FLUX_JOB_NNODES": str(size // local),
            },
            **{"PMI_RANK": r, "PMI_SIZE": s, "FLUX_JOB_ID": "f123"},
        },
        "jsrun": {**jsrun, **openmpi(rank, size, local), "JSM_NAMESPACE_LOCAL_SIZE": ls},
        "horovodrun": {
            **{"HOROVOD_RANK": r, "HOROVOD_SIZE": s, "HOROVOD_LOCAL_RANK": lr, "HOROVOD_LOCAL_SIZE": ls},
            **{"HOROVOD_CROSS_RANK": str(rank // local), "HOROVOD_CROSS_SIZE": str(size // local)},
        },
        "mpirun (Platform MPI)": {
            **{"MPI_RANKID": r, "MPI_NRANKS": s, "MPI_LOCALRANKID": lr, "MPI_LOCALNRANKS": ls},
        },
    }


@pytest.mark.parametrize("name", [launcher.name for launcher in LAUNCHERS])
def test_every_process_of_a_launcher_is_a_rank(name: str) -> None:
    for rank in range(8):
        environment = {**others(rank)[name], **WHERE}
        assert reports_for_job(environment) == (rank == 0)
        set_rank_variables(environment)
        told = {"RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_RANK": str(rank % 4), "LOCAL_WORLD_SIZE": "4", **WHERE}
        assert {key: environment[key] for key in told} == told
        set_rank_variables(environment)  # which is the same as once
        check_rendezvous(environment)
        assert launched_world(environment) == World(8, 4, name)


@pytest.mark.parametrize("name", [launcher.name for launcher in LAUNCHERS])
def test_on_one_host_the_ranks_meet_without_being_told_where(name: str) -> None:
    ports = set()
    for rank in range(4):
        environment = others(rank, size=4)[name]
        set_rank_variables(environment)
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        ports.add(environment["MASTER_PORT"])
        check_rendezvous(environment)
    assert len(ports) == 1


@pytest.mark.parametrize("name", [launcher.name for launcher in LAUNCHERS])
def test_one_process_is_one_rank(name: str) -> None:
    environment = others(0, size=1, local=1)[name]
    before = dict(environment)
    set_rank_variables(environment)
    assert environment == before
    assert launched_world(environment) == World(1, 1, name)


@pytest.mark.parametrize("name", [launcher.name for launcher in LAUNCHERS])
def test_on_several_hosts_the_launcher_is_to_say_where_with_its_own_words(name: str) -> None:
    (launcher,) = [one for one in LAUNCHERS if one.name == name]
    for given in ({}, {"MASTER_ADDR": "node1"}):
        environment = {**others(5)[name], **given}
        with pytest.raises(LauncherError, match=r"on 2 hosts, and .*MASTER_PORT must say where rank 0 is") as error:
            set_rank_variables(environment)
        assert launcher.exports() in str(error.value)
        assert "MASTER_ADDR=$(hostname -f)" in str(error.value).replace("MASTER_ADDR $", "MASTER_ADDR=$")
        assert environment["RANK"] == "5", "by which the reporting rank is chosen"


def test_open_mpis_words() -> None:
    (launcher,) = [one for one in LAUNCHERS if one.name == "mpirun (Open MPI)"]
    assert launcher.command(1, 4) == "mpirun -np 4"
    assert launcher.command(2, 4) == (
        "mpirun -np 8 --map-by ppr:4:node -x MASTER_ADDR=$(hostname -f) -x MASTER_PORT=29500"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda one: one.name)
def test_the_advice_starts_one_run_of_all_ranks_by_the_launcher_at_hand(
    launcher: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    name = launcher.name  # type: ignore[attr-defined]
    for started in (World(1, 1, name), World(4, 4, name)):
        assert f"start those with {launcher.command(2, 8)}" in refusal(started, config(2, 8))  # type: ignore[attr-defined]


READ = [
    ("torchrun in a rank of mpirun", {**openmpi(0, 1, 1), **TORCHRUN, **WHERE}, World(8, 4, "torchrun")),
    ("torchrun in one of several ranks", {**openmpi(1, 2, 1), **TORCHRUN, **WHERE}, World(8, 4, "torchrun")),
    ("mpirun in a shell that srun has started", {**step(0, 1, 1), **openmpi(3, 4)}, World(4, 4, "mpirun (Open MPI)")),
    (
        "mpirun whose daemons srun has started",
        {**step(1, 2, 1), **openmpi(5), **WHERE},
        World(8, 4, "mpirun (Open MPI)"),
    ),
    ("mpiexec whose daemons srun has started", {**step(1, 2, 1), **mpich(5), **WHERE}, World(8, 4, "mpiexec (MPICH)")),
    ("mpirun in a job's script", {**BATCH, **openmpi(3, 4)}, World(4, 4, "mpirun (Open MPI)")),
    ("mpirun in a shell of mpiexec", {**mpich(0, 1, 1), **openmpi(3, 4)}, World(4, 4, "mpirun (Open MPI)")),
    ("srun --mpi=pmi2", {**step(3), "PMI_RANK": "3", "PMI_SIZE": "4"}, World(4, 2, "srun")),
    ("srun --mpi=pmix", {**step(3), "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1.0"}, World(4, 2, "srun")),
    ("srun, whose plugin says all", {**step(3), **mpich(3, 4, 2)}, World(4, 2, "srun")),
    ("srun in a shell of mpirun", {**step(3), **openmpi(0, 1, 1)}, World(4, 2, "srun")),
    ("a shell of srun --mpi=pmi2", {**step(0, 1, 1), "PMI_RANK": "0", "PMI_SIZE": "1"}, World(1, 1, "python alone")),
    (
        "a shell of srun --mpi=pmix",
        {**step(0, 1, 1), "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0"},
        World(1, 1, "python alone"),
    ),
    (
        "a job that a task has submitted",
        {**step(3), **BATCH, "PMI_RANK": "3", "PMI_SIZE": "4"},
        World(1, 1, "python alone"),
    ),
    ("the shell of salloc", {**ALLOCATION, "WORLD_SIZE": "1"}, World(1, 1, "python alone")),
    (
        "a script that hands mpirun's rank on",
        {**openmpi(5), "RANK": "5", "WORLD_SIZE": "8", **WHERE},
        World(8, 4, "mpirun (Open MPI)"),
    ),
    (
        "a script that hands srun's rank on",
        {**step(3), "RANK": "3", "WORLD_SIZE": "4", **WHERE},
        World(4, None, "srun"),
    ),
    ("srun on a Cray", {**step(3), "ALPS_APP_PE": "3", "PMI_RANK": "3", "PMI_SIZE": "4"}, World(4, 2, "srun")),
    ("a job's script on a Cray", {**BATCH, "ALPS_APP_PE": "0"}, World(1, 1, "python alone")),
    (
        "srun's plugin for PALS",
        {**step(3), "PALS_RANKID": "3", "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"},
        World(4, 2, "srun"),
    ),
    (
        "mpirun_rsh, which says both",
        {**others(3, 4)["mpirun_rsh (MVAPICH2)"], "MPIRUN_RANK": "3"},
        World(4, 4, "mpirun_rsh (MVAPICH2)"),
    ),
    ("horovodrun over Open MPI", {**openmpi(3, 4), **others(3, 4)["horovodrun"]}, World(4, 4, "mpirun (Open MPI)")),
    ("WORLD_SIZE exported for srun", {**step(3), "WORLD_SIZE": "16"}, World(4, 2, "srun")),
]


@pytest.mark.parametrize(("where", "environment", "world"), READ, ids=[case[0] for case in READ])
def test_launchers_in_launchers(where: str, environment: dict[str, str], world: World) -> None:
    given = dict(environment)
    set_rank_variables(given)
    assert launched_world(given) == world, where
    if world.size > 1:
        check_rendezvous(given)
        assert given["LOCAL_RANK"].isdigit()


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
FEW = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **WHERE}
REFUSED = [
    ("PMI's rank without a size", {"PMI_RANK": "1"}, "PMI_RANK is 1, and there is no PMI_SIZE"),
    (
        "PMI's rank and size alone",
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
        "PMI_RANK is 1, and there is no MPI_LOCALRANKID or PMI_LOCAL_RANK and no MPI_LOCALNRANKS or PMI_LOCAL_SIZE",
    ),
    ("PMIx alone", {"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-a-1@1"}, "PMIX_RANK is 0, and PMIx has no variable"),
    ("aprun", {"ALPS_APP_PE": "3", "ALPS_APP_ID": "7"}, r"ALPS_APP_PE is 3, and aprun \(ALPS\) has no variable with"),
    ("old MVAPICH", {"MPIRUN_RANK": "1", "MPIRUN_NPROCS": "4"}, "MPIRUN_RANK is 1, .*; or unset MPIRUN_RANK to train"),
    ("PMI's own number alone", {"PMI_ID": "2"}, "PMI_ID is 2, and a launcher of PMI has no variable with the number"),
    ("half of Horovod", {"HOROVOD_RANK": "1"}, "HOROVOD_RANK is 1, and there is no HOROVOD_SIZE"),
    ("half of Platform MPI", {"MPI_RANKID": "1"}, "MPI_RANKID is 1, and there is no MPI_NRANKS"),
    ("prterun in a job", {**BATCH, "PMIX_RANK": "2", "PMIX_NAMESPACE": "prterun-a-1@1"}, "PMIX_RANK is 2, and PMIx"),
    ("Open MPI without a size", without(openmpi(1), "OMPI_COMM_WORLD_SIZE"), "there is no OMPI_COMM_WORLD_SIZE"),
    ("no number on its host", without(openmpi(1), "OMPI_COMM_WORLD_LOCAL_RANK"), "no OMPI_COMM_WORLD_LOCAL_RANK"),
    (
        "a rank beyond the size",
        {**openmpi(1), "OMPI_COMM_WORLD_RANK": "8"},
        "OMPI_COMM_WORLD_RANK is 8 and .*_SIZE is 8",
    ),
    ("no number", {**mpich(1), "PMI_SIZE": "four"}, "PMI_SIZE is 'four', and is to be a whole number"),
    ("a negative number", {**mpich(1), "PMI_RANK": "-1"}, "PMI_RANK is '-1', and is to be a whole number"),
    ("digits of another script", {**mpich(1), "PMI_RANK": "\u0661"}, "PMI_RANK is .*, and is to be a whole number"),
    (
        "two launchers that differ",
        {**openmpi(1, 2, 2), **others(3)["flux run"]},
        "FLUX_TASK_RANK is 3 of 8, and OMPI_COMM_WORLD_RANK is 1 of 2",
    ),
    (
        "round-robin",
        {**openmpi(1), "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        "consecutive ranks: mpirun -np 8 --map-by ppr:4:node",
    ),
    ("uneven hosts", {**openmpi(1, 7, 4), **WHERE}, "started 7 ranks, 4 of them on this host"),
    (
        "half of Flux",
        without(others(1)["flux run"], "FLUX_JOB_NNODES"),
        "FLUX_TASK_RANK is 1, and there is no FLUX_JOB_NNODES",
    ),
    (
        "a step with half of its variables",
        without(step(1), "SLURM_GTIDS"),
        "SLURM_PROCID is 1, .* and SLURM_GTIDS is not set",
    ),
    ("a step without layout", without(step(1), "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE is not set"),
    (
        "a task that knows no step",
        {name: value for name, value in step(1).items() if "STEP" not in name},
        "SLURM_STEP_NUM_TASKS, SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST are not set",
    ),
    ("a task beyond the step", {**step(1), "SLURM_PROCID": "4"}, "SLURM_PROCID is 4 and SLURM_STEP_NUM_TASKS is 4"),
    ("a layout of something else", {**step(1), "SLURM_STEP_TASKS_PER_NODE": "2(x2"}, "is to be like"),
    ("RANK alone", {"RANK": "1"}, "RANK is 1, and WORLD_SIZE is not set"),
    ("WORLD_SIZE alone", {"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4, and nothing says which .*\(RANK\)"),
    ("RANK beyond WORLD_SIZE", {**FEW, "RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4: ranks are from 0 to 3"),
    ("RANK of none", {**FEW, "RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
    ("RANK is no number", {**FEW, "RANK": "one"}, "RANK is 'one'"),
    ("RANK is empty", {**FEW, "RANK": ""}, "RANK is ''"),
    ("no LOCAL_RANK", without(FEW, "LOCAL_RANK"), "RANK is 1 of 4, and LOCAL_RANK"),
    ("LOCAL_RANK beyond the host's", {**FEW, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, LOCAL_WORLD_SIZE is 1"),
    ("LOCAL_RANK of another host", {**FEW, "LOCAL_RANK": "0"}, "RANK is 1, LOCAL_RANK is 0 and LOCAL_WORLD_SIZE is 4"),
    ("no address", without(FEW, "MASTER_ADDR"), "RANK is 1 of 4, and MASTER_ADDR must say where rank 0 is"),
    ("no port", {**FEW, "MASTER_PORT": "0"}, "MASTER_PORT is 0, and ports are from 1 to 65535"),
    ("a rank alone, and a port beyond the last", {**ALONE, "MASTER_PORT": "99999"}, "MASTER_PORT is 99999, and ports"),
    ("a rank alone, and no port", {**ALONE, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', and is to be a whole number"),
    ("a rank alone, and no address", {**ALONE, "MASTER_ADDR": "a b"}, "MASTER_ADDR is 'a b', and is to be the name"),
    ("a port beyond the last", {**FEW, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536, and ports are from 1 to 65535"),
    ("a port that is none", {**FEW, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
]


@pytest.mark.parametrize(("where", "environment", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_read_is_refused(where: str, environment: dict[str, str], message: str) -> None:
    given = dict(environment)
    with pytest.raises(LauncherError, match=message):  # noqa: PT012  # either of both is the first that is asked
        set_rank_variables(given)
        check_rendezvous(given)


PORT = """
import os, sys
from dsmoe.runtime.launchers import LAUNCHERS, launcher_port
print(launcher_port(os.environ, next(one for one in LAUNCHERS if one.rank == "PMI_RANK")))
"""
LAUNCH = """
import os, subprocess, sys
for rank in range(2):
    shell = ["sh", "-c", '"$0" "$1"; true', sys.executable, sys.argv[1]] if rank else [sys.executable, sys.argv[1]]
    variables = {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    subprocess.run(shell, env={**os.environ, **variables}, check=True)
"""


def test_the_ranks_of_one_launcher_have_its_port_through_any_shell_and_another_launcher_has_another(
    tmp_path: Path,
) -> None:
    (tmp_path / "port.py").write_text(PORT, encoding="utf-8")
    ports = []
    for outer in ({}, mpich(0, 2, 2)):  # the second as if one of the ranks started a launcher
        command = [sys.executable, "-c", LAUNCH, str(tmp_path / "port.py")]
        done = subprocess.run(
            command, env={**os.environ, **outer}, capture_output=True, text=True, check=True, encoding="utf-8"
        )
        ports.append(done.stdout.split())
    assert [len(set(same)) for same in ports] == [1, 2], "rank 0 there cannot be told from its launcher"
    assert ports[0][0] != ports[1][1]
    assert all(10_000 <= int(port) < 30_000 for same in ports for port in same)


def test_a_launcher_that_is_not_seen_leaves_the_port_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process.parents", lambda _: [])
    assert launcher_port(openmpi(1, 2, 2), LAUNCHERS[3]) is None
    with pytest.raises(LauncherError, match=r"add -x MASTER_ADDR=\$\(hostname -f\) -x MASTER_PORT=29500"):
        set_rank_variables(openmpi(1, 2, 2))


RANK = """
import sys
import torch, torch.distributed as dist
from dsmoe.runtime.world import launched_world
from dsmoe.runtime.processes import join_processes, leave_processes
rank = join_processes("cpu")
total = torch.tensor([float(rank.rank + 1)])
dist.all_reduce(total)
assert (rank.world_size, total.item()) == (2, 3.0)
assert launched_world().launcher == sys.argv[1]
leave_processes()
"""


@pytest.mark.parametrize("name", ["mpirun (Open MPI)", "mpiexec (MPICH)"])
def test_processes_join_each_other(name: str, tmp_path: Path) -> None:
    """Two processes with no more than such a launcher's variables."""
    kept = {"PATH", "PYTHONPATH", "HOME", "DS_ACCELERATOR", "OMP_NUM_THREADS"}
    base = {key: value for key, value in os.environ.items() if key in kept}
    environments = [{**base, **others(rank, 2, 2)[name]} for rank in range(2)]
    codes, texts = run_side_by_side([[sys.executable, "-c", RANK, name]] * 2, environments, tmp_path)
    assert codes == [0, 0], texts
