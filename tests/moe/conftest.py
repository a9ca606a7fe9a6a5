"""Entries of the registries that dsmoe does not have."""

import pytest

from tests.helpers import made_up_entries as made_up


@pytest.fixture
def made_up_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.register(monkeypatch)
