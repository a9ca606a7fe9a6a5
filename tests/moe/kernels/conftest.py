"""The kernels run on the GPU where there is one, else in Triton's interpreter.

Triton decides when it is imported, and so do the kernels: before any test module here, and not by a fixture.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: F401


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
