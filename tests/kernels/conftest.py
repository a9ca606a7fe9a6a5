"""What the kernels do not write stands out as NaN; entries of the registries that dsmoe does not have."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import made_up_entries as made_up


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def made_up_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.register(monkeypatch)
