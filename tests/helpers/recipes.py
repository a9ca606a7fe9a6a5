"""A small valid config to bend, and what the loader says about it."""

from __future__ import annotations

from pathlib import Path

from dsmoe.config import Config, ConfigError, load_config

VALID = """\
name: tiny
cluster:
  nodes: 2
  devices_per_node: 4
parallel:
  expert: 4
model:
  vocab_size: 257
  hidden_size: 64
  num_layers: 4
  num_heads: 4
  max_sequence_length: 256
moe:
  num_experts: 8
  expert_ffn_size: 128
data:
  sources:
    - name: plays
      path: builtin:shakespeare
    - name: code
      path: builtin:python
optimizer:
  lr: 1e-3
train:
  steps: 100
  batch_tokens: 8192
  micro_batch_size: 2
  sequence_length: 256
"""
"""World size 8; one pass takes 8 * 2 * 256 = 4096 tokens."""


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> Config:
    """Load the valid config with overrides."""
    return load_config(write(folder, VALID), overrides)


def problems_of(path: Path | str, *overrides: str) -> list[str]:
    """Return what is wrong with a file, with its folder cut from every message; no problem fails the test."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return [problem.replace(f"{Path(path).parent}/", "") for problem in error.problems]
    raise AssertionError(f"{path} loads without a problem")


def problems(folder: Path, *overrides: str) -> list[str]:
    """Return what is wrong with the valid config under these overrides."""
    return problems_of(write(folder, VALID), *overrides)


def problems_with(folder: Path, *edits: tuple[str, str]) -> list[str]:
    """Return what is wrong with the valid config after replacing pieces of its text."""
    text = VALID
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return problems_of(write(folder, text))
