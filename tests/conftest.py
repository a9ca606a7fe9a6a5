"""Set before any test is imported: Triton interprets, text is prepared once, no settings of the user count."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter, chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

_LAUNCHERS = (
    *("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "MV2_", "PALS_", "FLUX_", "JSM_"),
    *("HOROVOD_", "MPI_RANKID", "MPI_NRANKS", "MPIRUN_", "ALPS_"),
    *("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_"),
)
_SETTINGS = ("HF_", "HUGGINGFACE_", "DSMOE_", "DEEPSPEED_", "GLOO_", "NCCL_", "TORCH_", "TENSORBOARD_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def pytest_configure(config: pytest.Config) -> None:
    forget_settings()
    folder = tempfile.TemporaryDirectory(prefix="dsmoe_tests_")
    os.environ["DSMOE_TESTS_CORPUS"] = folder.name  # for small_config, also where ranks call it
    config.add_cleanup(folder.cleanup)


def forget_settings() -> None:
    """Test the same in a job of a cluster, behind a proxy or with a cache elsewhere as on a bare machine."""
    from dsmoe.runtime.launchers import LAUNCHERS  # not above: Triton is told first to interpret

    of_launchers = {
        name for each in LAUNCHERS for name in (each.rank, *each.size, *each.local_rank, *each.local_size, each.nodes)
    }
    for name in list(os.environ):
        if name in of_launchers or name.startswith((*_LAUNCHERS, *_SETTINGS)) or name.lower() in _PROXIES:
            del os.environ[name]
    for name in ("RANK", "WORLD_SIZE", "ROLE_RANK", "CUDA_LAUNCH_BLOCKING", "COLUMNS"):
        os.environ.pop(name, None)
