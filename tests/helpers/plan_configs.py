"""Configs for the planner's tests: the smallest that validates, with whole sections replaced."""

from __future__ import annotations

from typing import Any

from dsmoe.config.schema import Config


def make_config(**sections: dict[str, Any] | None) -> Config:
    """Build a config from keys per section; keys that are not given keep the values below."""
    defaults: dict[str, Any] = {
        "model": {
            "vocab_size": 100,
            "hidden_size": 8,
            "num_layers": 3,
            "num_heads": 2,
            "ffn_size": 16,
            "max_sequence_length": 32,
        },
        "data": {"sources": ({"name": "prose", "path": "builtin:shakespeare"},)},
        "optimizer": {"lr": 1e-3},
        "train": {"batch_tokens": 64, "sequence_length": 32, "steps": 10},
    }
    for section, keys in sections.items():
        defaults[section] = None if keys is None else {**defaults.get(section, {}), **keys}
    return Config.model_validate({"name": "test", **defaults})
