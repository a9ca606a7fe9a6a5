"""Launchers that know neither torch nor DeepSpeed, and the rank by the variables of each: Open MPI, MPICH, Flux, ...

They set a process' rank, the number of ranks and the rank on its host, and not where rank 0 is. Sources:

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
from dsmoe.runtime.variables import LauncherError, start_advice, whole_number

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below 32768, where Linux' ephemeral ports begin


@dataclass(frozen=True)
class Launcher:
    """A launcher: the names of its variables (a tuple: the first that is set), and its command."""

    name: str
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    on_one_host: str
    """The command on one host, a format of `ranks`, `nodes` and `devices`."""
    on_hosts: str
    """The command on several hosts, the same."""
    export: str
    """The option that sets a variable for all ranks, a format of `name` and `value`."""
    nodes: str = ""
    """The variable with the number of nodes, for launchers without `local_size`."""

    def command(self, nodes: int, devices: int) -> str:
        """Return the command that starts `nodes` x `devices` ranks, up to the program."""
        start = self.on_one_host if nodes == 1 else f"{self.on_hosts} {self.exports()}"
        return start.format(ranks=nodes * devices, nodes=nodes, devices=devices)

    def exports(self) -> str:
        """Return the options that set MASTER_ADDR and MASTER_PORT, for rank 0 on the host on which they are typed."""
        values = {"MASTER_ADDR": "$(hostname -f)", "MASTER_PORT": "29500"}
        return " ".join(self.export.format(name=name, value=value) for name, value in values.items())


LAUNCHERS = (
    # Before Open MPI, whose variables jsrun sets, too.
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
    # Flux and PALS before MPICH, of whose variables they set some.
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
"""Variables with a rank, of launchers that set no usable size."""


@dataclass(frozen=True)
class Task:
    """A process of a launcher, by the launcher's own variables."""

    launcher: Launcher
    rank: int
    size: int
    local_rank: int
    local_size: int


_RANKS = (*(launcher.rank for launcher in LAUNCHERS), *WITHOUT_SIZE)
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *(name for launcher in LAUNCHERS for name in launcher.size))


def rank_from_variables(environment: Mapping[str, str]) -> str:
    """Return the rank by the first variable that has one, else `0`; for messages before the ranks have joined."""
    ranks = [environment[name].strip() for name in ("RANK", *_RANKS) if name in environment]
    if "RANK" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        ranks.append(environment.get("SLURM_PROCID", "0").strip())
    return ranks[0] if ranks and is_whole_number(ranks[0]) else "0"


def is_single_process(environment: Mapping[str, str]) -> bool:
    """Return whether no launcher's variable says that there are other ranks."""
    sizes = [environment[name].strip() for name in _SIZES if environment.get(name)]
    has_rank = any(name in environment for name in ("RANK", *_RANKS))
    return all(size == "1" for size in sizes) if sizes else not has_rank


def run_key(environment: Mapping[str, str]) -> str:
    """Return a text that the ranks of one run on a host share: the rendezvous, or else the launcher's process id."""
    if environment.get("MASTER_PORT"):
        rendezvous = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return "/".join(environment.get(name, "") for name in rendezvous)
    launcher_names = tuple(name for name in (*_RANKS, "SLURM_PROCID") if name in environment)
    names = launcher_names or ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return f"launcher {launcher_process(environment, names)}"


def find_task(environment: Mapping[str, str]) -> Task | None:
    """Return the task of the launcher in `LAUNCHERS` that has started this process; None if none has.

    Of nested launchers, the one with several ranks counts. PMI variables without a local rank in a job of Slurm are
    srun's own, which sets Slurm's as well.

    Raises:
        LauncherError: variables of a launcher are missing, or two launchers contradict each other.
    """
    # Rank 5 of 2 nodes x 4, under Open MPI:
    #   OMPI_COMM_WORLD_RANK=5, _SIZE=8, _LOCAL_RANK=1, _LOCAL_SIZE=4  ->  Task(mpirun, 5, 8, 1, 4)
    # Under Flux, which has no local size: FLUX_JOB_SIZE=8 / FLUX_JOB_NNODES=2 = 4.
    # In the job of a `srun --ntasks=1 mpirun -np 8`, PMI_RANK=0 of PMI_SIZE=1 is there too, and the 8 ranks count.
    tasks: list[Task] = []
    missing: list[str] = []
    for launcher in LAUNCHERS:
        if launcher.rank not in environment:
            continue
        if launcher.rank == "PMI_RANK" and _is_srun_pmi(environment, launcher):
            continue
        absent = _missing_variables(environment, launcher)
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
        raise LauncherError(f"{'; '.join(missing)}: this is one of several processes, or none; {start_advice()}")
    for name, launcher_name in WITHOUT_SIZE.items():
        if name in environment and not _is_set_by_srun(environment, name):
            raise LauncherError(
                f"{name} is {whole_number(environment, name)}, and {launcher_name} has no variable with the number of "
                f"ranks; {start_advice()}; or unset {name} to train on one rank"
            )
    return None


def set_task_variables(environment: MutableMapping[str, str], task: Task) -> None:
    """Set the variables of torch and DeepSpeed for a task: its rank and the rendezvous.

    On one host the port follows from the launcher's process id (`launcher_port`); on several hosts the launcher has to
    export MASTER_ADDR and MASTER_PORT.

    Raises:
        LauncherError: the tasks are laid over the hosts in an unsupported way, or the rendezvous is not known.
    """
    # The rank first: it decides who reports an error.
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
    """Return a port that all ranks of one launcher on this host derive alike, and ranks of another launcher do not.

    It follows from the id of the launcher's process: the nearest ancestor without this rank's variables (a shell in
    between has them). Ids start anew in a container, so the container's namespace of processes is added. None if the
    process cannot be seen.
    """
    # Ancestors of a rank with OMPI_COMM_WORLD_RANK=1: bash (has it, too), mpirun with id 4711 (has not), a shell.
    # The port is 10000 + (4711 + checksum of "pid:[4026531836]") % 20000, the same for every rank of that mpirun.
    process = launcher_process(environment, (launcher.rank, *launcher.size, *launcher.local_rank))
    if process is None:
        return None
    shift = 0
    with suppress(OSError):
        shift = zlib.crc32(os.readlink("/proc/self/ns/pid").encode())
    return FIRST_PORT + (process + shift) % NUM_PORTS


def launcher_process(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    """Return the id of the nearest ancestor in which one of these variables differs from `environment`.

    That process has set them for this one. None if it cannot be seen.
    """
    import psutil  # slow to import, and only needed here

    own = [environment.get(name) for name in names]
    for process in psutil.Process().parents():
        others: Mapping[str, str] = {}
        with suppress(psutil.Error, OSError):  # another user's process is not a rank
            others = process.environ()
        if [others.get(name) for name in names] != own:
            return int(process.pid)
    return None


def find_launcher(name: str) -> Launcher | None:
    """Return the launcher of that name in `LAUNCHERS`, or None."""
    return next((launcher for launcher in LAUNCHERS if launcher.name == name), None)


def _is_srun_pmi(environment: Mapping[str, str], launcher: Launcher) -> bool:
    return "SLURM_JOB_ID" in environment and not any(
        name in environment for name in (*launcher.local_rank, *launcher.local_size)
    )


def _is_set_by_srun(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a variable of `WITHOUT_SIZE` is set by srun, next to Slurm's own."""
    if name == "PMIX_RANK":
        return environment.get("PMIX_NAMESPACE", "").startswith("slurm.")
    return "SLURM_JOB_ID" in environment


def _missing_variables(environment: Mapping[str, str], launcher: Launcher) -> str:
    """The launcher's variables that are missing, as text; empty if none is."""
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
            f"{names[0]} is {rank} and {names[1]} is {size}: ranks are from 0 to {max(size - 1, 0)}; {start_advice()}"
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
            f"cannot be; {start_advice()}"
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


def matching_tasks(environment: Mapping[str, str], rank: int, size: int) -> Iterator[Task]:
    """Yield the tasks, of any launcher, that agree with torch's variables: rank `rank` of `size`."""
    for launcher in LAUNCHERS:
        with suppress(LauncherError):
            if launcher.rank in environment and not _missing_variables(environment, launcher):
                task = _task(environment, launcher)
                if (task.rank, task.size) == (rank, size):
                    yield task
