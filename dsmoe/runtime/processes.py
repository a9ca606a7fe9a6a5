"""Join this process to the others of its run: rank, device, backend, timeout.

Works the same under `deepspeed`, `torchrun`, `srun`, `mpirun` and `python` alone (one rank): the first two set RANK,
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
from dsmoe.runtime.consistency import Claims
from dsmoe.runtime.local_device import DeviceError as DeviceError
from dsmoe.runtime.local_device import describe_device, take_device
from dsmoe.runtime.lost_ranks import LostRanksError, first_line
from dsmoe.runtime.missing_ranks import call_roll
from dsmoe.runtime.progress import Job
from dsmoe.runtime.rendezvous import Rendezvous
from dsmoe.runtime.waiting import while_others_wait
from dsmoe.runtime.watchdog import process_watch, stop_watching
from dsmoe.runtime.world import agree_with_outer_launcher, check_meeting, join_launcher, launched_world

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """Who this process is: its rank, how many there are, and the device it drives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run (console, files)."""
        return self.rank == 0


def join_processes(
    device: str = "cuda",
    timeout: timedelta = timedelta(minutes=30),
    interface: str | None = None,
    claims: Claims | None = None,
) -> Rank:
    """Start `torch.distributed` and DeepSpeed's view of it, once per process.

    Args:
        device: `cuda` (NCCL) or `cpu` (gloo).
        timeout: how long a collective of the world group may wait; `Groups` gives its own groups the same.
        interface: the network interface between nodes; None leaves the choice to NCCL and gloo.
        claims: what every rank must have alike (`dsmoe.runtime.consistency`), compared before the first collective.

    Raises:
        DifferentRanksError: ranks have other claims than rank 0, or drive one device; on all of them.
        HostError: no CUDA device or no such interface on this host, or the port is taken.
        DeviceError: no CUDA device for this rank.
        LauncherError: what the launcher says of this process is not all that it takes, or cannot be.
        UserError: ranks that a launcher has laid over the nodes in a way that is not supported.
        LostRanksError: not all ranks have come within `timeout`.
    """
    join_launcher()
    _choose_accelerator(device)
    if interface is not None:
        _use_interface(interface)
    if not Rendezvous.from_environment().is_launched:
        os.environ.update(Rendezvous(rank=0, local_rank=0, size=1, address="127.0.0.1", port=0).variables())
    world = launched_world()
    if "OMP_NUM_THREADS" not in os.environ and (world.devices_per_node or world.size) > 1:
        torch.set_num_threads(1)  # as torchrun does: every rank would take all cores
    local_rank = Rendezvous.from_environment().local_rank or 0
    agree_with_outer_launcher(local_rank)
    index = take_device(local_rank) if device == "cuda" else 0
    if not comm.is_initialized():
        _switch_off_shared_memory_op()
        backend = "nccl" if device == "cuda" else "gloo"
        try:
            if not torch.distributed.is_initialized():  # by the program around us, or by a file
                check_meeting()
                described = describe_device(index) if device == "cuda" else ""
                call_roll(world.devices_per_node, timeout, claims or {}, described)
                if device == "cuda" and index != local_rank:  # DeepSpeed would bind the group to device LOCAL_RANK
                    torch.distributed.init_process_group(
                        backend, timeout=timeout, device_id=torch.device("cuda", index)
                    )
            comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            raise _rendezvous_problem(error) from error
        if torch.distributed.is_initialized():
            process_watch().timeout = timeout
    where = torch.device("cuda", index) if device == "cuda" else torch.device("cpu")
    return Rank(torch.distributed.get_rank(), local_rank, torch.distributed.get_world_size(), where)


def leave_processes() -> None:
    """Destroy every process group, so that the process ends without warnings."""
    stop_watching()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_deepspeed() -> None:
    """Keep off the console what DeepSpeed reports, and makes torch warn of, that a user can do nothing about."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls a name that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated")


def set_timeout_everywhere(timeout: timedelta) -> None:
    """Give every process group of this process the timeout, those included that DeepSpeed made with its default.

    NCCL's groups get a minute more: its watchdog ends the process without saying whom it waited for, so
    `Watch.end_stalls` is to come first.
    """
    # torch has no public call for this: `init_process_group(timeout=)` reaches the world group only.
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    process_watch().timeout = timeout
    for group in list(_world.pg_map):
        later = timedelta(minutes=1) if torch.distributed.get_backend(group) == "nccl" else timedelta(0)
        _set_pg_timeout(timeout + later, group)


def _choose_accelerator(device: str) -> None:
    """Make DeepSpeed agree with the config about the device: on a GPU machine it would pick CUDA for a CPU run."""
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
    """Let NCCL and gloo use this network interface, where the environment names none for this host."""
    wanted = {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}  # without `=`, any whose name begins so
    unset = {variable: value for variable, value in wanted.items() if variable not in os.environ}
    there = [known for _, known in socket.if_nameindex()]
    if unset and name not in there:
        raise HostError(
            f"cluster.interface ({name}) is not among the network interfaces of this host ({', '.join(there)}); where "
            f"hosts differ, set {' and '.join(unset)} on each instead"
        )
    os.environ.update(unset)


def _rendezvous_problem(error: Exception) -> Exception:
    """What has kept the ranks from joining: the port of rank 0, or a rank that has gone again."""
    rendezvous = Rendezvous.from_environment()
    if "EADDRINUSE" in str(error):
        advice = "give the launcher another --master_port, or set MASTER_PORT under srun or mpirun"
        return HostError(f"port {rendezvous.port} is in use on this machine; {advice}")
    return LostRanksError(
        f"rank 0 came to {rendezvous.place}, where the ranks meet, and does not answer there any more: "
        f"{first_line(error)}"
    )


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from building `deepspeed_shm_comm` on the CPU.

    It needs a compiler, takes half a minute, and a rank killed while it holds the build lock makes every later run
    wait without a word. Losses are the same without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def on_first_rank(action: Callable[[], T], what: str | Job = "work of rank 0") -> T:
    """Let rank 0 do `action` while the others wait, and give every rank its result, or raise its error on every rank.

    The others wait without a timeout: what only one rank does (tokenising) may take longer than a collective may. The
    log says every minute `what` it is, or the job of which this is a part. The result and the error must be picklable.
    The error says of itself that all ranks have it: `is_shared(error)`.

    Raises:
        LostRanksError: rank 0 has ended, or gives no sign of life (`dsmoe.runtime.waiting`).
    """
    with _part_of(what) as job:
        outcome = while_others_wait([0], lambda: _outcome_of(action), job) or [None, None]
    torch.distributed.broadcast_object_list(outcome, src=0)
    return cast(T, _result_of([outcome])[0])


def on_first_of_hosts(action: Callable[[], object], what: str) -> None:
    """Let the first rank of every host do `action` while the others wait, or raise the first error on every rank.

    Without a timeout, and with `what`, as in `on_first_rank`.
    """
    local_ranks: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(local_ranks, Rendezvous.from_environment().local_rank or 0)
    _on_ranks([rank for rank, local in enumerate(local_ranks) if local == 0], action, what)


def on_every_rank(action: Callable[[], T], what: str | Job = "work of every rank") -> list[T]:
    """Let every rank do `action`, and give all of them all results by rank, or raise the first rank's error on all.

    A rank that fails alone would leave the others waiting in the next collective. Without a timeout, and with `what`,
    as in `on_first_rank`: one of them may read from a slower disk.
    """
    return _on_ranks(range(torch.distributed.get_world_size()), action, what)


def _on_ranks(workers: Collection[int], action: Callable[[], T], what: str | Job) -> list[Any]:
    """What `action` has returned on every rank, None where it was not done."""
    with _part_of(what) as job:
        outcome = while_others_wait(workers, lambda: _outcome_of(action), job) or [None, None]
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    return _result_of(outcomes)


def _part_of(what: str | Job) -> AbstractContextManager[Job]:
    """The job that this is a part of, or one of its own."""
    return nullcontext(what) if isinstance(what, Job) else Job("waiting", what, ends_with_rank=True)


def _outcome_of(action: Callable[[], Any]) -> list[Any]:
    """[result, None], or [None, error]."""
    try:
        return [action(), None]
    except Exception as error:
        keep_place(error, f"on rank {torch.distributed.get_rank()} ({socket.gethostname()})")
        return [None, error]


def _result_of(outcomes: list[list[Any]]) -> list[Any]:
    """All results, or the first error, which every rank raises alike."""
    for _, error in outcomes:
        if error is not None:
            error.shared_by_all_ranks = True
            raise error
    return [result for result, _ in outcomes]


def is_shared(error: BaseException) -> bool:
    """Whether every rank has the same error, so that one of them may speak for all."""
    return getattr(error, "shared_by_all_ranks", False)
