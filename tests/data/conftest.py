"""Fixture: a small valid config around the data section under test."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe.config.schema import Config

MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Build a config from sources (keyword dictionaries) and changes to the sections `data`, `train` and `model`."""

    def make(*sources: dict, data: dict | None = None, train: dict | None = None, vocab_size: int = 257) -> Config:
        return Config.model_validate(
            {
                "name": "test",
                "model": {
                    "vocab_size": vocab_size,
                    "hidden_size": 8,
                    "num_layers": 1,
                    "num_heads": 1,
                    "max_sequence_length": 4096,
                },
                "optimizer": {"lr": 1e-3},
                "data": {"sources": sources, "cache_dir": str(tmp_path / "cache"), **(data or {})},
                "train": {"batch_tokens": 64, "sequence_length": 8, **(train or {})},
            }
        )

    return make
