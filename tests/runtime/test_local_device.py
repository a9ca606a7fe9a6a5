"""The device that a rank drives, of all that its launcher shows it or of one; and two ranks on one device."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from dsmoe.engine import make_engine
from dsmoe.runtime import processes
from dsmoe.runtime.consistency import RankMismatchError
from dsmoe.runtime.local_device import Device, DeviceError, describe_device, device_index, select_device, shared_devices
from dsmoe.runtime.rendezvous_barrier import rendezvous_barrier
from dsmoe.runtime.spawn import CONTEXT
from tests.helpers.ports import free_port


class FakeCuda:
    """torch's functions of CUDA devices, for a rank that sees those of `uuids`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uuids: list[str | None]) -> None:
        self.current: list[int] = []
        properties = [SimpleNamespace(uuid=uuid) if uuid is not None else SimpleNamespace() for uuid in uuids]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 4, 0), (3, 4, 3), (0, 1, 0), (3, 1, 0), (1, 2, 1)])
def test_a_rank_drives_the_device_of_its_number_or_the_only_one_that_it_sees(
    local_rank: int, visible: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, [f"GPU-{number}" for number in range(visible)])
    assert (device_index(local_rank), select_device(local_rank)) == (index, index)
    assert cuda.current == [index]


@pytest.mark.parametrize("local_rank", [2, 3])
def test_a_rank_that_sees_some_devices_and_not_its_own_is_told_of_both_ways(
    local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch, ["GPU-0", "GPU-1"])
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    message = (
        rf"rank 3 is to drive device {local_rank} of this host and sees 2 \(CUDA_VISIBLE_DEVICES=0,1\); .* --gpus-per-"
    )
    with pytest.raises(DeviceError, match=message):
        select_device(local_rank)


def json_of(uuid: str, host: str = "node1", visible: str = "CUDA_VISIBLE_DEVICES=0") -> str:
    return json.dumps({"uuid": uuid, "host": host, "visible": visible})


def test_two_ranks_on_one_device_are_named_with_it() -> None:
    assert shared_devices([json_of("GPU-a"), json_of("GPU-b"), json_of("MIG-a"), json_of("MIG-b")]) == ""
    assert shared_devices(["", "", ""]) == "", "on the CPU, and where a device has no name"
    text = shared_devices(
        [
            json_of("GPU-a"),
            json_of("GPU-b"),
            json_of("GPU-a"),
            json_of("GPU-c", "node2"),
            json_of("GPU-c", "node2"),
            "",
        ]
    )
    assert text.startswith(
        "ranks 0, 2 drive one device, GPU-a of node1 (CUDA_VISIBLE_DEVICES=0); "
        "ranks 3-4 drive one device, GPU-c of node2 (CUDA_VISIBLE_DEVICES=0). Every rank needs a device of its own"
    )


def test_one_device_has_one_name_whatever_shows_it() -> None:
    text = shared_devices(
        [
            json_of("GPU-a", visible="CUDA_VISIBLE_DEVICES=0"),
            json_of("GPU-a", visible="CUDA_VISIBLE_DEVICES=GPU-a"),
        ]
    )
    assert text.startswith("ranks 0-1 drive one device, GPU-a of node1 (CUDA_VISIBLE_DEVICES=0). Every rank")


def test_a_device_is_described_by_what_no_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, ["GPU-a", None])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    described = Device(**json.loads(describe_device(0)))
    assert (described.uuid, described.visible) == ("GPU-a", "CUDA_VISIBLE_DEVICES is not set")
    assert "\n" not in describe_device(0)
    assert describe_device(1) == ""


def come(rank: int, port: str, uuids: list[str], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(uuids)), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        rendezvous_barrier(2, timedelta(seconds=30), {"train.seed": "0"}, json_of(uuids[rank]))
        result = "joined"
    except RankMismatchError as error:
        result = f"{error.exit_code} {error}"
    (folder / str(rank)).write_text(result, encoding="utf-8")
    while rank == 0 and len(list(folder.iterdir())) < len(uuids):  # it has the store
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("uuids", "beginning"),
    [
        (["GPU-a", "GPU-b", "GPU-c"], "joined"),
        (["GPU-a", "GPU-b", "GPU-a"], "2 ranks 0, 2 drive one device, GPU-a of node1"),
    ],
    ids=["each its own", "one is shared"],
)
def test_ranks_compare_their_devices_before_they_join(uuids: list[str], beginning: str, tmp_path: Path) -> None:
    port = free_port()
    ranks = [CONTEXT.Process(target=come, args=(rank, port, uuids, tmp_path)) for rank in range(len(uuids))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    results = [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(len(uuids))]
    assert [result.startswith(beginning) for result in results] == [True] * 3, results


@pytest.mark.parametrize("visible", [1, 4])
def test_joining_binds_the_group_to_the_device_that_the_rank_drives(
    visible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed binds it to device LOCAL_RANK, which a rank that sees one device does not have."""
    cuda = FakeCuda(monkeypatch, [f"GPU-{number}" for number in range(visible)])
    calls: list[tuple[str, Any]] = []
    environment = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")  # of the mpirun that has started torchrun
    monkeypatch.setattr(processes, "_choose_accelerator", lambda _: None)
    monkeypatch.setattr(
        processes, "rendezvous_barrier", lambda *given: calls.append(("roll", json.loads(given[3])["uuid"]))
    )
    monkeypatch.setattr(comm, "is_initialized", lambda: False)
    monkeypatch.setattr(comm, "init_distributed", lambda **_: calls.append(("deepspeed", None)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, timeout, device_id: calls.append((backend, device_id)),
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    rank = processes.join_processes("cuda")
    index = 0 if visible == 1 else 3
    assert (rank.local_rank, rank.device) == (3, torch.device("cuda", index))
    assert cuda.current == [index]
    bound = [("nccl", torch.device("cuda", 0))] if visible == 1 else []
    assert calls == [("roll", f"GPU-{index}"), *bound, ("deepspeed", None)]
    assert os.environ["LOCAL_RANK"] == "3", "the rank's number on its host"
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "3", "DeepSpeed's engine ends where the two differ"


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (4, 3)])
def test_deepspeeds_engine_takes_the_same_device(visible: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own code, with an accelerator that keeps what it is told."""
    FakeCuda(monkeypatch, ["GPU-a"] * visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    taken: list[int] = []
    accelerator = SimpleNamespace(
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}", set_device=taken.append
    )
    monkeypatch.setattr(make_engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr("deepspeed.runtime.engine.get_accelerator", lambda: accelerator)
    monkeypatch.setattr("deepspeed.runtime.engine.dist", SimpleNamespace(get_world_size=lambda: 4, get_rank=lambda: 3))
    arguments = make_engine._device_of_its_own()
    made = SimpleNamespace()
    DeepSpeedEngine._do_args_sanity_check(made, arguments)
    DeepSpeedEngine._configure_with_arguments(made, arguments, None)
    DeepSpeedEngine._set_distributed_vars(made, arguments)
    assert (taken, made.device) == ([expected], torch.device("cuda", expected))


def test_on_the_cpu_deepspeed_is_told_nothing() -> None:
    assert get_accelerator().device_name() == "cpu"
    assert make_engine._device_of_its_own() is None
