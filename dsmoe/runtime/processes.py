"""Processes: join the others of the run (rank, device, backend, timeout), leave, and run work on some ranks.

The same under `deepspeed`, `torchrun`, `srun`, `mpirun` and `python` alone (one rank): the first two set RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for the others they are filled in.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from deepspeed import comm

from dsmoe.config.errors import HostError, keep_place
from dsmoe.runtime.consistency import Fingerprint
from dsmoe.runtime.local_device import DeviceError as DeviceError
from dsmoe.runtime.local_device import describe_device, select_device
from dsmoe.runtime.lost_ranks import LostRanksError, first_line
from dsmoe.runtime.progress import Job
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.rendezvous_barrier import rendezvous_barrier
from dsmoe.runtime.waiting import while_others_wait
from dsmoe.runtime.watchdog import process_watchdog, stop_watching
from dsmoe.runtime.world import check_rendezvous, launched_world, override_outer_local_rank, set_rank_variables

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """The rank of this process, the number of ranks, and the device that it drives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True for rank 0, which writes the run's console and files."""
        return self.rank == 0


def join_processes(
    device: str = "cuda",
    timeout: timedelta = timedelta(minutes=30),
    interface: str | None = None,
    fingerprint: Fingerprint | None = None,
) -> Rank:
    """Start `torch.distributed` and `deepspeed.comm`, once per process.

    Args:
        device: `cuda` (NCCL) or `cpu` (gloo).
        timeout: of the world group's collectives; `Groups` gives its own groups the same.
        interface: the network interface between nodes; None leaves the choice to NCCL and gloo.
        fingerprint: the settings, code and data that every rank must share (`dsmoe.runtime.consistency`),
            compared before the first collective.

    Raises:
        RankMismatchError: ranks have another fingerprint than rank 0, or two drive one device; on all ranks.
        HostError: this host has no CUDA device or no such interface, or the port is taken.
        DeviceError: no CUDA device for this rank.
        LauncherError: the launcher's variables are incomplete or contradict each other.
        UserError: the launcher has laid the ranks over the nodes in an unsupported way.
        LostRanksError: ranks are missing after `timeout`.
    """
    set_rank_variables()
    _choose_accelerator(device)
    if interface is not None:
        _use_interface(interface)
    if not Rendezvous.from_environment().is_launched:
        os.environ.update(Rendezvous(rank=0, local_rank=0, size=1, address="127.0.0.1", port=0).variables())
    world = launched_world()
    if "OMP_NUM_THREADS" not in os.environ and (world.devices_per_node or world.size) > 1:
        torch.set_num_threads(1)  # as torchrun does: every rank would take all cores
    local_rank = Rendezvous.from_environment().local_rank or 0
    override_outer_local_rank(local_rank)
    index = select_device(local_rank) if device == "cuda" else 0
    if not comm.is_initialized():
        _switch_off_shared_memory_op()
        backend = "nccl" if device == "cuda" else "gloo"
        try:
            if not torch.distributed.is_initialized():  # a program may have done that, or `run_ranks`, by a file
                check_rendezvous()
                described = describe_device(index) if device == "cuda" else ""
                rendezvous_barrier(world.devices_per_node, timeout, fingerprint or {}, described)
                if device == "cuda" and index != local_rank:  # DeepSpeed would bind the group to device LOCAL_RANK
                    torch.distributed.init_process_group(
                        backend, timeout=timeout, device_id=torch.device("cuda", index)
                    )
            comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            raise _rendezvous_problem(error) from error
        if torch.distributed.is_initialized():
            process_watchdog().timeout = timeout
    torch_device = torch.device("cuda", index) if device == "cuda" else torch.device("cpu")
    return Rank(torch.distributed.get_rank(), local_rank, torch.distributed.get_world_size(), torch_device)


def leave_processes() -> None:
    """Destroy every process group, so that the process ends without warnings."""
    stop_watching()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's reports below WARNING, and a warning of torch that a user can do nothing about."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls a name that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated")


def set_group_timeouts(timeout: timedelta) -> None:
    """Set the timeout of every process group of this process, including those that DeepSpeed made with its default.

    NCCL's groups get a minute more: NCCL's own watchdog ends the process without naming the missing ranks, so
    `Watchdog.watch_for_stalls` has to act first.
    """
    # torch has no public call for this: `init_process_group(timeout=)` reaches the world group only.
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    process_watchdog().timeout = timeout
    for group in list(_world.pg_map):
        later = timedelta(minutes=1) if torch.distributed.get_backend(group) == "nccl" else timedelta(0)
        _set_pg_timeout(timeout + later, group)


def _choose_accelerator(device: str) -> None:
    """Set DeepSpeed's accelerator to the config's device: on a GPU machine it would choose CUDA for a CPU run."""
    if device == "cuda" and not torch.cuda.is_available():
        raise HostError(
            "cluster.device asks for a CUDA device and torch sees none on this machine; "
            "set cluster.device: cpu to train on the CPU over gloo"
        )
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() != device:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CPU_Accelerator() if device == "cpu" else CUDA_Accelerator())


def _use_interface(name: str) -> None:
    """Set the network interface of NCCL and gloo, unless the environment names one for this host."""
    wanted = {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}  # without `=`, any whose name begins so
    unset = {variable: value for variable, value in wanted.items() if variable not in os.environ}
    known = [interface for _, interface in socket.if_nameindex()]
    if unset and name not in known:
        raise HostError(
            f"cluster.interface ({name}) is not among the network interfaces of this host ({', '.join(known)}); where "
            f"hosts differ, set {' and '.join(unset)} on each instead"
        )
    os.environ.update(unset)


def _rendezvous_problem(error: Exception) -> Exception:
    """The error to raise for torch's at the rendezvous: the port is taken, or rank 0 has ended."""
    rendezvous = Rendezvous.from_environment()
    if "EADDRINUSE" in str(error):
        advice = "give the launcher another --master_port, or set MASTER_PORT under srun or mpirun"
        return HostError(f"port {rendezvous.port} is in use on this machine; {advice}")
    return LostRanksError(
        f"rank 0 came to {rendezvous.endpoint}, where the ranks meet, and does not answer there any more: "
        f"{first_line(error)}"
    )


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from building `deepspeed_shm_comm` on the CPU.

    The build needs a compiler, takes half a minute, and a rank killed while it holds the build lock makes every later
    run hang silently. Losses are the same without the op.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_on_rank_0(action: Callable[[], T], what: str | Job = "work of rank 0") -> T:
    """Run `action` on rank 0 while the others wait; return its result, or raise its error, on every rank. Collective.

    The others wait without a timeout: the work of one rank (tokenising) may take longer than a collective may. The log
    says every minute `what` it is, or the job of which this is a part. The result and the error must be picklable. The
    error is marked as one of all ranks (`is_shared`).

    Raises:
        LostRanksError: rank 0 has ended or has no heartbeat (`dsmoe.runtime.waiting`).
    """
    with _as_job(what) as job:
        outcome = while_others_wait([0], lambda: _outcome_of(action), job) or [None, None]
    torch.distributed.broadcast_object_list(outcome, src=0)
    return cast(T, _result_of([outcome])[0])


def run_on_host_leaders(action: Callable[[], object], what: str) -> None:
    """Run `action` on the leader of every host while the others wait; raise the first error on every rank.

    Collective; no timeout, and `what` is logged, as in `run_on_rank_0`.
    """
    local_ranks: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(local_ranks, Rendezvous.from_environment().local_rank or 0)
    _on_ranks([rank for rank, local in enumerate(local_ranks) if local == 0], action, what)


def run_on_all_ranks(action: Callable[[], T], what: str | Job = "work of every rank") -> list[T]:
    """Run `action` on every rank; return all results by rank, or raise the first rank's error, on every rank.

    For work that can fail on one rank: the others would wait for it in the next collective. Collective; no timeout,
    since one rank may read from a slower disk, and `what` is logged, as in `run_on_rank_0`.
    """
    return _on_ranks(range(torch.distributed.get_world_size()), action, what)


def _on_ranks(workers: Collection[int], action: Callable[[], T], what: str | Job) -> list[Any]:
    """Return the results of `action` by rank, None for a rank that is not among the workers."""
    with _as_job(what) as job:
        outcome = while_others_wait(workers, lambda: _outcome_of(action), job) or [None, None]
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    return _result_of(outcomes)


def _as_job(what: str | Job) -> AbstractContextManager[Job]:
    """The given job, or a new one of that name."""
    return nullcontext(what) if isinstance(what, Job) else Job("waiting", what, fails_on_lost_rank=True)


def _outcome_of(action: Callable[[], Any]) -> list[Any]:
    """Return [result, None] or [None, error]."""
    try:
        return [action(), None]
    except Exception as error:
        keep_place(error, f"on rank {torch.distributed.get_rank()} ({socket.gethostname()})")
        return [None, error]


def _result_of(outcomes: list[list[Any]]) -> list[Any]:
    """Return all results, or raise the first error, the same on every rank."""
    for _, error in outcomes:
        if error is not None:
            error.shared_by_all_ranks = True
            raise error
    return [result for result, _ in outcomes]


def is_shared(error: BaseException) -> bool:
    """Return whether every rank has this error, so that one of them can report it for all."""
    return getattr(error, "shared_by_all_ranks", False)
