"""Join this process to the others of its run: rank, device, backend, timeout.

Works the same under `deepspeed`, `torchrun` and `python` alone (one rank): each of the first two sets RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for the last they are filled in here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from deepspeed import comm

from dsmoe.config.errors import UserError

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


def join_processes(device: str = "cuda", timeout: timedelta = timedelta(minutes=30)) -> Rank:
    """Start `torch.distributed` and DeepSpeed's view of it, once per process.

    Args:
        device: `cuda` (NCCL) or `cpu` (gloo).
        timeout: how long a collective of the world group may wait; `Groups` gives its own groups the same.

    Raises:
        UserError: no CUDA device where one is asked for.
    """
    _choose_accelerator(device)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if not comm.is_initialized():
        _switch_off_shared_memory_op()
        backend = "nccl" if device == "cuda" else "gloo"
        comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    where = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return Rank(torch.distributed.get_rank(), local_rank, torch.distributed.get_world_size(), where)


def leave_processes() -> None:
    """Destroy every process group, so that the process ends without warnings."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_timeout_everywhere(timeout: timedelta) -> None:
    """Give every process group of this process the timeout, those included that DeepSpeed made with its default."""
    # torch has no public call for this: `init_process_group(timeout=)` reaches the world group only.
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(timeout, group)


def _choose_accelerator(device: str) -> None:
    """Make DeepSpeed agree with the config about the device: on a GPU machine it would pick CUDA for a CPU run."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "cluster.device asks for a CUDA device and torch sees none on this machine; "
            "set cluster.device: cpu to train on the CPU over gloo"
        )
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from building `deepspeed_shm_comm` on the CPU.

    It needs a compiler, takes half a minute, and a rank killed while it holds the build lock makes every later run
    wait without a word. Losses are the same without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def on_first_rank(action: Callable[[], T]) -> T:
    """Let rank 0 do `action` while the others wait, and give every rank its result, or raise its error on every rank.

    The result and the error must be picklable. The error says of itself that all ranks have it: `is_shared(error)`.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].shared_by_all_ranks = True
        raise outcome[1]
    return cast(T, outcome[0])


def is_shared(error: BaseException) -> bool:
    """Whether every rank has the same error, so that one of them may speak for all."""
    return getattr(error, "shared_by_all_ranks", False)


def first_failed_rank() -> int:
    """Say that this rank has failed, and learn which one was the first to say so (rank 0, if nobody can be asked)."""
    rank = str(torch.distributed.get_rank())
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return int(store.compare_set("dsmoe/failed", "", rank).decode())
    except Exception:
        return 0  # the store lives in rank 0, which is gone
