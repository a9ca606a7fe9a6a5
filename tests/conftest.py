"""What has to be so before any test is imported: Triton's interpreter, and one folder of prepared text for all."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter, chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="dsmoe_tests_")
    os.environ["DSMOE_TESTS_CORPUS"] = folder.name  # for small_config, also where ranks call it
    config.add_cleanup(folder.cleanup)
