"""Join this process to the others of its run: rank, device, backend, timeout.

Works the same under `deepspeed`, `torchrun`, `srun` and `python` alone (one rank): the first two set RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for the others they are filled in.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from deepspeed import comm

from dsmoe.config.errors import UserError
from dsmoe.launch.world import join_slurm, launched_world
from dsmoe.parallel.claims import Claims
from dsmoe.parallel.jobs import Job
from dsmoe.parallel.roll import call_roll
from dsmoe.parallel.watch import process_watch, stop_watching

T = TypeVar("T")


class HostError(UserError):
    """What is wrong on this host, and may be right on the others."""

    exit_code = 1


class DeviceError(HostError):
    """What is wrong with the device of this rank, and may be right with the host's others."""


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
        claims: what every rank must have alike (`dsmoe.parallel.claims`), compared before the first collective.

    Raises:
        DifferentRanksError: ranks have other claims than rank 0; on all of them.
        HostError: no CUDA device or no such interface on this host, or the port is taken.
        DeviceError: no CUDA device for this rank.
        UserError: ranks that srun has laid over the nodes in a way that is not supported.
        LostRanksError: not all ranks have come within `timeout`.
    """
    join_slurm()
    _choose_accelerator(device)
    if interface is not None:
        _use_interface(interface)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    world = launched_world()
    if "OMP_NUM_THREADS" not in os.environ and (world.devices_per_node or world.size) > 1:
        torch.set_num_threads(1)  # as torchrun does: every rank would take all cores
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        _take_device(local_rank)
    if not comm.is_initialized():
        _switch_off_shared_memory_op()
        backend = "nccl" if device == "cuda" else "gloo"
        try:
            if not torch.distributed.is_initialized():  # by the program around us, or by a file
                call_roll(world.devices_per_node, timeout, claims or {})
            comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
        except torch.distributed.DistNetworkError as error:
            raise _rendezvous_problem(error) from None
    where = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
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


def _take_device(local_rank: int) -> None:
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise DeviceError(
            f"rank {os.environ['RANK']} is to drive device {local_rank} of this host and sees {visible} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'is not set')}); every rank has to see all "
            f"devices of its host: under srun, give --gpus-per-node, without --gpus-per-task and --gpu-bind"
        )
    torch.cuda.set_device(local_rank)


def _rendezvous_problem(error: Exception) -> Exception:
    """What keeps rank 0 from listening where the ranks meet, if it is the port; else the error."""
    if "EADDRINUSE" not in str(error):
        return error
    advice = "give the launcher another --master_port, or set MASTER_PORT under srun"
    return HostError(f"port {os.environ.get('MASTER_PORT')} is in use on this machine; {advice}")


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from building `deepspeed_shm_comm` on the CPU.

    It needs a compiler, takes half a minute, and a rank killed while it holds the build lock makes every later run
    wait without a word. Losses are the same without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def on_first_rank(action: Callable[[], T], what: str = "") -> T:
    """Let rank 0 do `action` while the others wait, and give every rank its result, or raise its error on every rank.

    The others wait without a timeout: what only one rank does (tokenising) may take longer than a collective may.
    The result and the error must be picklable. The error says of itself that all ranks have it: `is_shared(error)`.
    Name `what` it does, if that may take long: then the log says so every minute.
    """
    if what:
        with Job("first rank", what) as job:
            if torch.distributed.get_rank() == 0:
                job.at("working on it")
            else:
                job.waits("waiting for rank 0")
            return on_first_rank(action)
    outcome: list[Any] = [None, None]
    store = torch.distributed.distributed_c10d._get_default_store()
    rank = torch.distributed.get_rank()
    # Every rank counts its own calls, so that all of them mean the same one.
    done = f"dsmoe/first/{store.add(f'dsmoe/first/calls/{rank}', 1)}"
    if rank == 0:
        outcome = _outcome_of(action)
        store.set(done, "")
    else:
        while not store.check([done]):
            time.sleep(0.02)
    torch.distributed.broadcast_object_list(outcome, src=0)
    return cast(T, _result_of([outcome])[0])


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Let every rank do `action`, and give all of them all results by rank, or raise the first rank's error on all.

    A rank that fails alone would leave the others waiting in the next collective.
    """
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, _outcome_of(action))
    return _result_of(outcomes)


def _outcome_of(action: Callable[[], Any]) -> list[Any]:
    """[result, None], or [None, error]."""
    try:
        return [action(), None]
    except Exception as error:
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
