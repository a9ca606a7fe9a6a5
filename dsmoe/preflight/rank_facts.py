"""Facts of this rank that need no measurement: versions, device and environment."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dsmoe.config.dump import dump_config
from dsmoe.config.schema import Config
from dsmoe.train.environment import worth_recording

_STEERING = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_DEVICE_", "OMP_NUM_THREADS", "UCX_", "FI_")
_DRIVER = Path("/proc/driver/nvidia/version")


def versions(config: Config, device: torch.device) -> dict[str, str]:
    """Return what must be the same on all ranks: packages, the device's model and driver, and the config's text."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {package: _version_of(package) for package in ("deepspeed", "dsmoe")}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["CUDA"] = torch.version.cuda or torch.version.hip or "none"
        found["driver"] = _driver()
    text = dump_config(config)
    return {**found, "config": f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"}


def steering(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how the ranks talk to each other."""
    return {key: value for key, value in worth_recording(environment).items() if key.startswith(_STEERING)}


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The kernel driver's version, which containers share with their host."""
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", _DRIVER.read_text(encoding="utf-8")) if _DRIVER.exists() else None
    return found.group(1) if found else "unknown"
