"""What the kernels do not write stands out as NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
