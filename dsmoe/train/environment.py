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

from dsmoe.runtime.atomic_files import write_whole
from dsmoe.runtime.world import launched_world

_PACKAGES = ("dsmoe", "torch", "deepspeed", "datasets", "tokenizers", "numpy", "pydantic")
_NAMES = """
    MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_WORLD_SIZE CROSS_SIZE LOCAL_SIZE NODE_RANK
    NNODES JOB_COMPLETION_INDEX LD_LIBRARY_PATH
    OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_SCHEDULE MKL_NUM_THREADS
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING CUDA_HOME CUDA_PATH
    CUDA_MODULE_LOADING CUDA_CACHE_PATH CUDA_CACHE_DISABLE CUDA_MPS_PIPE_DIRECTORY CUBLAS_WORKSPACE_CONFIG
    NVIDIA_VISIBLE_DEVICES NVIDIA_TF32_OVERRIDE
    DS_ACCELERATOR DS_ENV_FILE DS_BUILD_OPS DS_SKIP_CUDA_CHECK DEEPSPEED_TIMEOUT
    PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_NVML_BASED_CUDA_CHECK
    TORCH_CPP_LOG_LEVEL TORCH_DISTRIBUTED_DEBUG TORCH_CUDNN_V8_API_ENABLED TORCH_LOGS TORCH_SHOW_CPP_STACKTRACES
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_AVOID_RECORD_STREAMS
    TORCH_NCCL_USE_COMM_NONBLOCKING TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC
    TORCH_NCCL_TRACE_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_HIGH_PRIORITY
    TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS
    GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME
    NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT NCCL_BUFFSIZE NCCL_CHECKS_DISABLE NCCL_COLLNET_ENABLE
    NCCL_COMM_BLOCKING NCCL_CONF_FILE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_DEBUG_FILE NCCL_DEBUG_SUBSYS
    NCCL_DMABUF_ENABLE NCCL_GRAPH_MIXING_SUPPORT NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_AR_THRESHOLD NCCL_IB_CUDA_SUPPORT
    NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_HCA NCCL_IB_MERGE_VFS NCCL_IB_PCI_RELAXED_ORDERING NCCL_IB_PKEY
    NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_SPLIT_DATA_ON_QPS NCCL_IB_TC NCCL_IB_TIMEOUT
    NCCL_IGNORE_CPU_AFFINITY NCCL_LAUNCH_MODE NCCL_LL_THRESHOLD NCCL_MAX_CTAS NCCL_MAX_NCHANNELS NCCL_MAX_NRINGS
    NCCL_MIN_CTAS NCCL_MIN_NCHANNELS NCCL_MIN_NRINGS NCCL_NCHANNELS_PER_NET_PEER NCCL_NET NCCL_NET_DISABLE_INTRA
    NCCL_NET_FORCE_FLUSH NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_NET_PLUGIN NCCL_NET_SHARED_BUFFERS
    NCCL_NET_SHARED_COMMS NCCL_NSOCKS_PERTHREAD NCCL_NTHREADS NCCL_NVB_DISABLE NCCL_NVLS_ENABLE NCCL_OOB_NET_IFNAME
    NCCL_P2P_DIRECT_DISABLE NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_P2P_NET_CHUNKSIZE NCCL_P2P_USE_CUDA_MEMCPY
    NCCL_PROTO NCCL_PXN_DISABLE NCCL_RAS_ENABLE NCCL_SHM_DISABLE NCCL_SHM_USE_CUDA_MEMCPY NCCL_SINGLE_RING_THRESHOLD
    NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS NCCL_SOCKET_RETRY_CNT NCCL_TOPO_FILE NCCL_TUNER_PLUGIN
    NCCL_WORK_FIFO_DEPTH
    FI_PROVIDER FI_EFA_USE_DEVICE_RDMA FI_EFA_FORK_SAFE FI_LOG_LEVEL
    UCX_NET_DEVICES UCX_TLS UCX_IB_GID_INDEX UCX_LOG_LEVEL UCX_RNDV_SCHEME UCX_MAX_RNDV_RAILS
    SLURM_CLUSTER_NAME SLURM_CPUS_ON_NODE SLURM_CPUS_PER_TASK SLURM_CPU_BIND SLURM_DISTRIBUTION SLURM_GPUS_ON_NODE
    SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GTIDS SLURM_JOB_CPUS_PER_NODE SLURM_JOB_GPUS SLURM_JOB_ID
    SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_JOB_PARTITION SLURM_JOB_START_TIME SLURM_JOB_END_TIME SLURM_LOCALID
    SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE SLURM_NNODES SLURM_NODEID SLURM_NODELIST SLURM_NPROCS SLURM_NTASKS
    SLURM_NTASKS_PER_NODE SLURM_PROCID SLURM_RESTART_COUNT SLURM_STEP_ID SLURM_STEP_NODELIST SLURM_STEP_NUM_NODES
    SLURM_STEP_NUM_TASKS SLURM_STEP_TASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_TOPOLOGY_ADDR
    SLURM_TOPOLOGY_ADDR_PATTERN SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST
"""
_RECORDED = frozenset(_NAMES.split())
"""Variables that decide how ranks meet and compute: whatever else begins with NCCL_ or SLURM_ may be a secret, as
SLURM_JWT is."""
_SECRET_INSIDE = re.compile(
    r"(token|secret|pass|key|jwt|credential|auth|\bsig|signature)\w*=|\w:[^\s@]+@|\bBearer\b|\bhf_", re.IGNORECASE
)
"""Another variable inside of a value, a password or a signature in an address, a token."""


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
        "packages": {name: package_version(name) for name in _PACKAGES},
        "cuda": _cuda() if torch.cuda.is_initialized() else None,
        "environment": worth_recording(os.environ),
    }
    write_whole(folder / "environment.json", json.dumps(facts, indent=2) + "\n")


def worth_recording(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks meet and compute, by a list of names."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name in _RECORDED and not _SECRET_INSIDE.search(value)
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
        "driver": driver.read_text(encoding="utf-8").strip() if driver.exists() else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit that this package is of, where it lies in a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, encoding="utf-8"
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
