"""The ranks of launchers that know neither torch nor DeepSpeed, by the variables of each: Open MPI, MPICH, Flux, ...

They say a process' number, how many there are and its place on its host, and not where rank 0 is. Sources:

* Open MPI: docs.open-mpi.org, "Environment variables set by mpirun" (OMPI_COMM_WORLD_*); seen with 4.1.4.
* MPICH, Intel MPI (Hydra): src/pm/hydra/lib/pmiserv_common.h and proxy/pmip_cb.c (PMI_*, MPI_LOCALRANKID,
  MPI_LOCALNRANKS); seen with MPICH 4.0.2. Cray's PMI has PMI_LOCAL_RANK and PMI_LOCAL_SIZE instead.
* MVAPICH2: user guide, "MV2_COMM_WORLD_*".
* PALS (HPE Cray): mpiexec(1); of the size, PMI_SIZE is what the ranks get.
* Flux: flux-core, src/shell/task.c (FLUX_TASK_*, FLUX_JOB_SIZE, FLUX_JOB_NNODES).
* jsrun (LSF): IBM JSM, jsrun(1) (JSM_NAMESPACE_*).
* horovodrun (over gloo): horovod, runner/gloo_run.py, create_slot_env_vars (HOROVOD_*).
* Platform MPI (IBM, HP): its user's guide, "MPI_RANKID", "MPI_NRANKS"; the names on a host are Hydra's, too.
* aprun (Cray ALPS): aprun(1) (ALPS_APP_PE, without a size). Slurm's plugin for Cray sets it as well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dsmoe.plan.text import quantity
from dsmoe.runtime.rendezvous import is_whole_number
from dsmoe.runtime.variables import LauncherError, how_to_start, whole_number

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below 32768, where Linux begins to hand out ports


@dataclass(frozen=True)
class Launcher:
    """One launcher: the names of its variables, where any of several is meant, and how it is typed."""

    name: str
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    on_one_host: str
    """What starts so many ranks, to be formatted with `ranks`, `nodes` and `devices`."""
    on_hosts: str
    export: str
    """How a variable is given to all ranks, to be formatted with `name` and `value`."""
    nodes: str = ""
    """The variable with the number of nodes, where none has the ranks of one."""

    def command(self, nodes: int, devices: int) -> str:
        """The command that starts `nodes` x `devices` ranks, up to the program."""
        start = self.on_one_host if nodes == 1 else f"{self.on_hosts} {self.exports()}"
        return start.format(ranks=nodes * devices, nodes=nodes, devices=devices)

    def exports(self) -> str:
        """The options that tell all ranks where rank 0 is, if that is the host where they are typed."""
        values = {"MASTER_ADDR": "$(hostname -f)", "MASTER_PORT": "29500"}
        return " ".join(self.export.format(name=name, value=value) for name, value in values.items())


LAUNCHERS = (
    # Before Open MPI, whose variables it sets, too.
    Launcher(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK",
        size=("JSM_NAMESPACE_SIZE",),
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_size=("JSM_NAMESPACE_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        on_one_host="jsrun --nrs 1 --tasks_per_rs {devices} --cpu_per_rs ALL_CPUS --gpu_per_rs ALL_GPUS",
        on_hosts="jsrun --nrs {nodes} --rs_per_host 1 --tasks_per_rs {devices} --cpu_per_rs ALL_CPUS "
        "--gpu_per_rs ALL_GPUS",
        export="-E {name}={value}",
    ),
    # These two before MPICH, of which they set some.
    Launcher(
        name="flux run",
        rank="FLUX_TASK_RANK",
        size=("FLUX_JOB_SIZE",),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_size=(),
        nodes="FLUX_JOB_NNODES",
        on_one_host="flux run --nodes 1 --ntasks {ranks}",
        on_hosts="flux run --nodes {nodes} --ntasks {ranks}",
        export="--env={name}={value}",
    ),
    Launcher(
        name="mpiexec (PALS)",
        rank="PALS_RANKID",
        size=("PMI_SIZE", "PALS_SIZE"),
        local_rank=("PALS_LOCAL_RANKID",),
        local_size=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        on_one_host="mpiexec -n {ranks} --ppn {devices}",
        on_hosts="mpiexec -n {ranks} --ppn {devices}",
        export="--env {name}={value}",
    ),
    Launcher(
        name="mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        on_one_host="mpirun -np {ranks}",
        on_hosts="mpirun -np {ranks} --map-by ppr:{devices}:node",
        export="-x {name}={value}",
    ),
    Launcher(
        name="mpirun_rsh (MVAPICH2)",
        rank="MV2_COMM_WORLD_RANK",
        size=("MV2_COMM_WORLD_SIZE",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
        on_one_host="mpirun_rsh -np {ranks} -hostfile HOSTFILE",
        on_hosts="mpirun_rsh -np {ranks} -hostfile HOSTFILE",
        export="{name}={value}",
    ),
    Launcher(
        name="mpiexec (MPICH)",
        rank="PMI_RANK",
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        on_one_host="mpiexec -n {ranks}",
        on_hosts="mpiexec -n {ranks} -ppn {devices}",
        export="-genv {name} {value}",
    ),
    Launcher(
        name="horovodrun",
        rank="HOROVOD_RANK",
        size=("HOROVOD_SIZE",),
        local_rank=("HOROVOD_LOCAL_RANK",),
        local_size=("HOROVOD_LOCAL_SIZE",),
        on_one_host="horovodrun -np {ranks}",
        on_hosts="horovodrun -np {ranks} --hostfile HOSTFILE",
        export="env {name}={value}",  # a program that starts the program: horovodrun has no option for it
    ),
    Launcher(
        name="mpirun (Platform MPI)",
        rank="MPI_RANKID",
        size=("MPI_NRANKS",),
        local_rank=("MPI_LOCALRANKID",),
        local_size=("MPI_LOCALNRANKS",),
        on_one_host="mpirun -np {ranks}",
        on_hosts="mpirun -np {ranks} -hostfile HOSTFILE",
        export="-e {name}={value}",
    ),
)
WITHOUT_SIZE = {
    "PMIX_RANK": "PMIx",
    "ALPS_APP_PE": "aprun (ALPS)",
    "PMI_ID": "a launcher of PMI",
    "MPIRUN_RANK": "mpirun_rsh (of old MVAPICH)",
}
"""Variables with a process' number, of launchers that say no more that could be gone by."""


@dataclass(frozen=True)
class Task:
    """One of the processes that a launcher has started."""

    launcher: Launcher
    rank: int
    size: int
    local_rank: int
    local_size: int


_RANKS = (*(launcher.rank for launcher in LAUNCHERS), *WITHOUT_SIZE)
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *(name for launcher in LAUNCHERS for name in launcher.size))


def first_rank_known(environment: Mapping[str, str]) -> str:
    """This process' number by the first variable that has one, else `0`: who speaks before the ranks have met."""
    given = [environment[name].strip() for name in ("RANK", *_RANKS) if name in environment]
    if "RANK" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        given.append(environment.get("SLURM_PROCID", "0").strip())
    return given[0] if given and is_whole_number(given[0]) else "0"


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether no launcher says that there are other processes."""
    sizes = [environment[name].strip() for name in _SIZES if environment.get(name)]
    has_rank = any(name in environment for name in ("RANK", *_RANKS))
    return all(size == "1" for size in sizes) if sizes else not has_rank


def name_of_run(environment: Mapping[str, str]) -> str:
    """What the ranks of one run on one host have in common: where they meet, or else the process that started them."""
    if environment.get("MASTER_PORT"):
        where = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return "/".join(environment.get(name, "") for name in where)
    of_launchers = tuple(name for name in (*_RANKS, "SLURM_PROCID") if name in environment)
    names = of_launchers or ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return f"launcher {launcher_process(environment, names)}"


def find_task(environment: Mapping[str, str]) -> Task | None:
    """What the launcher says that has started this process; None if none of those here has.

    Of launchers within launchers the one counts that has started several. Its bare PMI variables in a job of Slurm are
    srun's own, which says the same in Slurm's.

    Raises:
        LauncherError: there is one, and it does not say all that it takes; or two of them say different things.
    """
    tasks: list[Task] = []
    missing: list[str] = []
    for launcher in LAUNCHERS:
        if launcher.rank not in environment:
            continue
        if launcher.rank == "PMI_RANK" and _is_slurms_own(environment, launcher):
            continue
        absent = _absent(environment, launcher)
        if absent:
            missing.append(f"{launcher.rank} is {whole_number(environment, launcher.rank)}, and there is no {absent}")
        else:
            tasks.append(_task(environment, launcher))
    several = [task for task in tasks if task.size > 1]
    for other in several[1:]:
        _check_same(several[0], other)
    if several or tasks:
        return (several or tasks)[0]
    if missing:
        raise LauncherError(f"{'; '.join(missing)}: this is one of several processes, or none; {how_to_start()}")
    for name, launcher_name in WITHOUT_SIZE.items():
        if name in environment and not _is_also_slurms(environment, name):
            raise LauncherError(
                f"{name} is {whole_number(environment, name)}, and {launcher_name} has no variable with the number of "
                f"ranks; {how_to_start()}; or unset {name} to train on one rank"
            )
    return None


def join_task(environment: MutableMapping[str, str], task: Task) -> None:
    """Say of a task by the names that torch and DeepSpeed know which rank it is, and where the ranks meet.

    On one host they meet at the port of the launcher's process number (`launcher_port`), on several where MASTER_ADDR
    and MASTER_PORT say, which the launcher has to hand on.

    Raises:
        LauncherError: the tasks are laid over the hosts in a way that is not supported, or do not know where to meet.
    """
    # First of all the rank, by which it is known who reports what is wrong.
    environment.update(RANK=str(task.rank), LOCAL_RANK=str(task.local_rank))
    nodes, rest = divmod(task.size, task.local_size)
    if rest or task.rank % task.local_size != task.local_rank:
        per_host = task.local_size if not rest else -(-task.size // (nodes + 1))
        raise LauncherError(
            f"{task.launcher.name} started {quantity(task.size, 'rank')}, {task.local_size} of them on this host, where"
            f" rank {task.rank} is number {task.local_rank}; every host must have equally many, with consecutive ranks:"
            f" {task.launcher.command(max(nodes, 1) + bool(rest), per_host)}"
        )
    environment.update(WORLD_SIZE=str(task.size), LOCAL_WORLD_SIZE=str(task.local_size))
    if nodes > 1:
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if absent:
            raise LauncherError(
                f"{task.launcher.name} started ranks on {nodes} hosts, and {' and '.join(absent)} must say where rank "
                f"0 is; where that is the host on which you type it, add {task.launcher.exports()}"
            )
        return
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in environment:
        port = launcher_port(environment, task.launcher)
        if port is None:
            raise LauncherError(
                f"the process of {task.launcher.name} is not seen from here, from whose number the port would follow "
                f"at which the ranks meet; add {task.launcher.exports()}"
            )
        environment["MASTER_PORT"] = str(port)


def launcher_port(environment: Mapping[str, str], launcher: Launcher) -> int | None:
    """A port that all ranks of one launcher on this host derive alike, and those of another one do not.

    It follows from the number of the launcher's process: the nearest one above this process that does not have this
    rank's variables, which a shell in between would have. In a container numbers begin anew, so that the container's
    name space of processes shifts it. None where there is no such process to be seen.
    """
    process = launcher_process(environment, (launcher.rank, *launcher.size, *launcher.local_rank))
    if process is None:
        return None
    shift = 0
    with suppress(OSError):
        shift = zlib.crc32(os.readlink("/proc/self/ns/pid").encode())
    return FIRST_PORT + (process + shift) % NUM_PORTS


def launcher_process(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    """The id of the nearest process above this one that has not all of these variables as `environment` has them.

    That is what has set them for this process. None where there is no such process to be seen.
    """
    import psutil  # which takes a moment, and is for this only

    own = [environment.get(name) for name in names]
    for process in psutil.Process().parents():
        others: Mapping[str, str] = {}
        with suppress(psutil.Error, OSError):  # another user's is none of the ranks
            others = process.environ()
        if [others.get(name) for name in names] != own:
            return int(process.pid)
    return None


def launcher_named(name: str) -> Launcher | None:
    """The launcher of that name, if it is one of those here."""
    return next((launcher for launcher in LAUNCHERS if launcher.name == name), None)


def _is_slurms_own(environment: Mapping[str, str], launcher: Launcher) -> bool:
    return "SLURM_JOB_ID" in environment and not any(
        name in environment for name in (*launcher.local_rank, *launcher.local_size)
    )


def _is_also_slurms(environment: Mapping[str, str], name: str) -> bool:
    """Whether srun sets a variable of `WITHOUT_SIZE`, and says the rest in Slurm's own."""
    if name == "PMIX_RANK":
        return environment.get("PMIX_NAMESPACE", "").startswith("slurm.")
    return "SLURM_JOB_ID" in environment


def _absent(environment: Mapping[str, str], launcher: Launcher) -> str:
    """What the launcher should say of this process, and does not."""
    if not any(name in environment for name in launcher.size):
        return " or ".join(launcher.size)
    if whole_number(environment, _first(environment, launcher.size)) == 1:
        return ""
    wanted = [launcher.local_rank, launcher.local_size or (launcher.nodes,)]
    return " and no ".join(" or ".join(names) for names in wanted if not any(name in environment for name in names))


def _task(environment: Mapping[str, str], launcher: Launcher) -> Task:
    names = [launcher.rank, _first(environment, launcher.size)]
    rank, size = (whole_number(environment, name) for name in names)
    if rank >= size:
        raise LauncherError(
            f"{names[0]} is {rank} and {names[1]} is {size}: ranks are from 0 to {max(size - 1, 0)}; {how_to_start()}"
        )
    if size == 1:
        return Task(launcher, 0, 1, 0, 1)
    local_rank_name = _first(environment, launcher.local_rank)
    local_rank = whole_number(environment, local_rank_name)
    if launcher.local_size:
        local_size_name = _first(environment, launcher.local_size)
        local_size = whole_number(environment, local_size_name)
    else:
        local_size_name = f"{names[1]} / {launcher.nodes}"
        nodes = whole_number(environment, launcher.nodes)
        if nodes == 0 or size % nodes:
            raise LauncherError(
                f"{names[1]} is {size} and {launcher.nodes} is {nodes}; every host must have equally many ranks"
            )
        local_size = size // nodes
    if not local_rank < local_size <= size:
        raise LauncherError(
            f"{local_rank_name} is {local_rank}, {local_size_name} is {local_size} and {names[1]} is {size}, which "
            f"cannot be; {how_to_start()}"
        )
    return Task(launcher, rank, size, local_rank, local_size)


def _check_same(first: Task, other: Task) -> None:
    if (first.rank, first.size) != (other.rank, other.size):
        raise LauncherError(
            f"two launchers say which rank this is: {first.launcher.rank} is {first.rank} of {first.size}, and "
            f"{other.launcher.rank} is {other.rank} of {other.size}; unset the variables of the outer one"
        )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next(name for name in names if name in environment)


def tasks_agreeing(environment: Mapping[str, str], rank: int, size: int) -> Iterator[Task]:
    """The launchers of several ranks that say the same of this process: rank `rank` of `size`."""
    for launcher in LAUNCHERS:
        with suppress(LauncherError):
            if launcher.rank in environment and not _absent(environment, launcher):
                task = _task(environment, launcher)
                if (task.rank, task.size) == (rank, size):
                    yield task
