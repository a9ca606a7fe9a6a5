"""Local device: the device that a rank drives, and a check that no two ranks drive the same one.

A rank sees all devices of its host, and drives the one of its local rank; or it sees one, which its launcher has given
to it alone (`srun --gpus-per-task=1`, `--gpu-bind`). Two ranks that see one by mistake would wait for each other in
NCCL, or end there with a message that names neither.
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
    """An error of this rank's device, which the host's other devices need not have."""


@dataclass(frozen=True)
class Device:
    """A CUDA device as a rank sees it."""

    uuid: str
    host: str
    visible: str
    """CUDA_VISIBLE_DEVICES of that rank, for messages."""


def device_index(local_rank: int) -> int:
    """Return the index, among the visible devices, of the one that the rank `local_rank` of its host drives."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def select_device(local_rank: int) -> int:
    """Make the device of this rank the current one, and return its index.

    Raises:
        DeviceError: this rank sees no device or several, and none with that index.
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
    """Return a device for `shared_devices`, as JSON on one line; empty if torch has no UUID to compare."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is None:
        return ""
    return json.dumps(asdict(Device(str(uuid), socket.gethostname(), _visible())))


def shared_devices(descriptions: Sequence[str]) -> str:
    """Return the error if several ranks drive one device, by the descriptions of all ranks; else empty."""
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
