"""Programs on ranks of this machine, as torchrun starts them, in children forked from a server that has torch already.

A real launcher takes ten seconds of both cores, most of it for importing torch and DeepSpeed once per rank;
tests/train/test_run.py has real ones.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsmoe.runtime.spawn import CONTEXT

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"


@dataclass
class Outcome:
    """How a program has ended: of several ranks the largest exit code, and what all of them have printed."""

    code: int
    out: str
    err: str


def start_on_ranks(
    ranks: int, folder: Path, *arguments: str, script: Path = PRETRAIN, timeout: float = 150, **settings: str
) -> Outcome:
    """`torchrun --nproc-per-node=RANKS SCRIPT ARGUMENTS` in `folder`, but for the exit code, which is the script's own.

    When a rank has failed, the others are asked to end, as a launcher does.

    Args:
        ranks: how many.
        folder: where they are started.
        arguments: of the script.
        script: run as `__main__`.
        timeout: seconds after which all are killed, and the test has failed.
        settings: further environment variables.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's is in its agent, too
    world = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(ranks))
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    world |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "forked",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    with tempfile.TemporaryDirectory() as streams:
        processes = [
            CONTEXT.Process(target=_rank_main, args=(rank, world, str(folder), str(script), arguments, streams))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [(Path(streams) / name).read_text(encoding="utf-8") for name in ("out", "err")]
    codes = [process.exitcode or 0 for process in processes]
    return Outcome(max(codes) or -min(codes), *texts)


def _wait(processes: list[Any], timeout: float) -> None:
    """Until all have ended; after a failure the others are asked to, and killed where they do not."""
    deadline, ends = time.monotonic() + timeout, None
    while any(process.exitcode is None for process in processes):
        assert time.monotonic() < deadline, "did not end"
        if ends is None and any(process.exitcode for process in processes):
            ends = time.monotonic() + 3.0
            for process in processes:
                process.terminate()
        elif ends is not None and time.monotonic() > ends:
            for process in processes:
                process.kill()
        time.sleep(0.02)


def _rank_main(
    rank: int, world: dict[str, str], folder: str, script: str, arguments: tuple[str, ...], streams: str
) -> None:
    os.chdir(folder)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{streams}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank))
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
