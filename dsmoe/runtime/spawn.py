"""Spawn: run a function on N gloo ranks of this machine and return the result of each.

The rendezvous is a file, so no port is taken. The ranks are forked from a server that has imported torch and DeepSpeed
once. If a rank fails, the call raises its error; if the ranks do not end in time, all are killed. They end with the
process that has started them, however it ends.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsmoe.exit_codes import DONE, FAILED
from dsmoe.runtime.processes import join_processes
from dsmoe.runtime.rendezvous import Rendezvous

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once instead of by every rank: dsmoe, and DeepSpeed's optimizers, which import torch's compiler (2 s).
CONTEXT.set_forkserver_preload(["dsmoe.train.run", "deepspeed.runtime.zero.muon.muon_optimizer"])


class RanksFailedError(RuntimeError):
    """A rank has failed, or the ranks have not ended in time; the text has the traceback of each."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Return `[function(*arguments) on rank 0, on rank 1, ...]`; each rank has joined, and has one thread.

    Args:
        world_size: the number of ranks.
        function: defined at the top level of a module; its result must be one that `torch.save` can write.
        arguments: must be picklable.
        timeout: seconds until all ranks are killed.

    Raises:
        RanksFailedError: a rank has raised an error, or the timeout has passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank_main, args=(folder, rank, world_size, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, Path(folder), timeout)
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(0.5)  # let the other ranks write their tracebacks too
            for process in processes:
                process.kill()
            break
        time.sleep(0.02)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime)
        text = "\n".join(
            f"--- rank {path.name.removeprefix('error_')}\n{path.read_text(encoding='utf-8')}" for path in errors
        )
        raise RanksFailedError(text or f"ranks did not end within {timeout} s")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)  # nobody would read the results


def _rank_main(
    folder: str, rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    rendezvous = Rendezvous(
        rank=rank, local_rank=rank, size=world_size, local_size=world_size, address="127.0.0.1", port=0
    )
    os.environ.update(rendezvous.variables())
    threading.Thread(target=_die_with_parent, daemon=True, name="dsmoe launcher").start()
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
        join_processes("cpu")
        torch.save(function(*arguments), Path(folder) / f"result_{rank}")
    except BaseException:
        (Path(folder) / f"error_{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(FAILED)
    torch.distributed.barrier()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # releases semaphores, such as tqdm's
    os._exit(DONE)  # nothing is left to do, and tearing gloo down races with the other ranks
