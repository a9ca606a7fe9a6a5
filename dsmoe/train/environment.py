"""`environment.json`: where a run was made, for whoever runs it again or asks why it was slow."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from dsmoe.durable import write_whole
from dsmoe.launch.world import launched_world

_PACKAGES = ("dsmoe", "torch", "deepspeed", "datasets", "tokenizers", "numpy", "pydantic")
_PREFIXES = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "MASTER_", "SLURM_"),
    *("TORCH_", "PYTORCH_", "CUDA_", "OMP_", "DS_", "DEEPSPEED_", "LD_LIBRARY_PATH"),
)
_FREE_TEXT = ("SLURM_JOB_COMMENT", "SLURM_SPANK_")
"""What users and sites put anything into."""
_SECRET = re.compile(r"TOKEN|SECRET|PASS|(?<!P)KEY|JWT|CREDENTIAL|AUTH", re.IGNORECASE)
"""Not NCCL_IB_PKEY, an InfiniBand partition."""
_SECRET_INSIDE = re.compile(rf"({_SECRET.pattern}|\bsig|signature)\w*=|://[^/\s]*@|\bBearer\b|\bhf_", re.IGNORECASE)
"""A variable inside of a value (SLURM_EXPORT_ENV has such), a password or a signature in an address, a token."""


def of_this_rank() -> tuple[str, str]:
    """Its host's name, and its device's."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    return platform.node(), device


def write_environment(folder: Path, ds_config: Mapping[str, Any], ranks: Sequence[tuple[str, str]]) -> None:
    """Write `ds_config.json` and `environment.json`; `ranks` has what `of_this_rank` says on each."""
    write_whole(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    facts = {
        "command": sys.argv,
        "launcher": launched_world().launcher,
        "world_size": len(ranks),
        "hosts": _hosts(ranks),
        "interfaces": _interfaces(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": _cuda() if torch.cuda.is_initialized() else None,
        "environment": worth_recording(os.environ),
    }
    write_whole(folder / "environment.json", json.dumps(facts, indent=2) + "\n")


def worth_recording(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks meet and compute, without what may be a secret (Slurm's SLURM_JWT is)."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_PREFIXES)
        and not name.startswith(_FREE_TEXT)
        and not _SECRET.search(name)
        and not _SECRET_INSIDE.search(value)
    }


def _hosts(ranks: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """By host, the first one's first: its ranks, and their devices."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (name, device) in enumerate(ranks):
        host = hosts.setdefault(name, {"ranks": [], "devices": []})
        host["ranks"].append(rank)
        host["devices"].append(device)
    return hosts


def _interfaces() -> dict[str, list[str]]:
    """The network interfaces of this host, with their IP addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [address.address for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def _cuda() -> dict[str, str | None]:
    driver = Path("/sys/module/nvidia/version")
    return {
        "driver": driver.read_text().strip() if driver.exists() else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit that this package is of, where it lies in a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
