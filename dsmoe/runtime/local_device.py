"""The device that a rank drives, and whether two ranks drive the same one.

A rank sees all devices of its host, and drives the one of its number there; or it sees one, which its launcher has
given to it alone (`srun --gpus-per-task=1`, `--gpu-bind`). Two ranks that see one by mistake would wait for each other
in NCCL, or end there with a message that names neither.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from dsmoe.config.errors import HostError
from dsmoe.plan.text import rank_names
from dsmoe.runtime.rendezvous import Rendezvous

SHOWN_DEVICES = 8


class DeviceError(HostError):
    """What is wrong with the device of this rank, and may be right with the host's others."""


@dataclass(frozen=True)
class Device:
    """A CUDA device as a rank sees it."""

    uuid: str
    host: str
    visible: str
    """What CUDA_VISIBLE_DEVICES is for that rank."""


def device_index(local_rank: int) -> int:
    """The number, among the devices that it sees, of the one that the host's rank number `local_rank` drives."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def take_device(local_rank: int) -> int:
    """Make the device of this rank the current one; returns its number.

    Raises:
        DeviceError: this rank sees several, and not so many.
    """
    visible, index = torch.cuda.device_count(), device_index(local_rank)
    if index >= visible:
        rank = Rendezvous.from_environment().rank
        raise DeviceError(
            f"rank {rank} is to drive device {local_rank} of this host and sees {visible} "
            f"({_visible()}); every rank has to see all devices of its host, or one of its own: under srun, give "
            "--gpus-per-node, or --gpus-per-task=1"
        )
    torch.cuda.set_device(index)
    return index


def describe_device(index: int) -> str:
    """A device for `shared_devices`, on one line; empty where it has no name of its own that could be compared."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is None:
        return ""
    return json.dumps(asdict(Device(str(uuid), socket.gethostname(), _visible())))


def shared_devices(descriptions: Sequence[str]) -> str:
    """What is wrong where several ranks drive one device, by the descriptions of all of them; else empty."""
    ranks: dict[str, list[int]] = {}
    devices: dict[str, Device] = {}
    for rank, description in enumerate(descriptions):
        if description:
            device = Device(**json.loads(description))
            ranks.setdefault(device.uuid, []).append(rank)
            devices.setdefault(device.uuid, device)
    shared = [
        f"{rank_names(ranks[uuid])} drive one device, {uuid} of {device.host} ({device.visible})"
        for uuid, device in devices.items()
        if len(ranks[uuid]) > 1
    ]
    if not shared:
        return ""
    more = "" if len(shared) <= SHOWN_DEVICES else f"; and {len(shared) - SHOWN_DEVICES} more"
    return (
        f"{'; '.join(shared[:SHOWN_DEVICES])}{more}. Every rank needs a device of its own: start as many on a host as "
        "it has, and let each see all of them (unset CUDA_VISIBLE_DEVICES) or its own one (srun --gpus-per-task=1)"
    )


def _visible() -> str:
    name = "CUDA_VISIBLE_DEVICES"
    return f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"
