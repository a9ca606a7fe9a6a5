"""Every recipe under configs/ loads, plans and fits; the numbers its comments state are these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsmoe.config.load import load_config
from dsmoe.plan import Batch, Topology, count_parameters, flops_per_token, resolve_device

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Expected:
    total: int
    active: int
    devices: int
    accumulation_steps: int
    held_gib: float
    """bf16 weights, fp32 gradients (whole at ZeRO-1), and the rank's share of fp32 sums and optimizer state."""


EXPECTED = {
    "mixtral_8x7b": Expected(46_702_792_704, 12_879_925_248, 64, 8, 51.3),
    "qwen3_30b_a3b": Expected(30_532_122_624, 3_353_032_704, 64, 8, 36.0),
    "small_8gpu": Expected(1_756_662_784, 347_376_640, 8, 4, 5.2),
    "switch_top1": Expected(1_893_550_848, 109_923_072, 8, 2, 5.2),
    "tiny_cpu": Expected(3_429_504, 1_070_208, 2, 1, 0.0),
    "tiny_cpu_dense": Expected(1_066_112, 1_066_112, 2, 1, 0.0),
    "trillion": Expected(1_028_299_010_304, 34_752_278_784, 2048, 2, 47.6),
}


def test_every_recipe_is_expected() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


def test_every_shared_piece_is_included_by_some_recipe() -> None:
    recipes = "".join(path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.yaml"))
    pieces = [str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml")]
    assert pieces
    assert [piece for piece in pieces if piece not in recipes] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_plans_and_fits(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [])
    expected = EXPECTED[name]
    topology, batch, counts = Topology.from_config(config), Batch.from_config(config), count_parameters(config)
    assert config.name == name
    assert (counts.total, counts.active) == (expected.total, expected.active)
    assert topology.world_size == expected.devices
    assert batch.accumulation_steps == expected.accumulation_steps
    assert batch.tokens_per_step == config.train.batch_tokens
    assert flops_per_token(config, counts).training > 6 * (counts.active - counts.embedding) * 0.99

    held = counts.per_device(topology)
    own_bytes = (4 + 12) * (held.shared / topology.data + held.experts / topology.expert_data)
    whole_bytes = {1: 2 + 4, 2: 2}[config.parallel.zero_stage] * held.total
    held_gib = (whole_bytes + own_bytes) / 2**30
    assert round(held_gib, 1) == expected.held_gib
    device = resolve_device(config.cluster.device)
    assert device is not None
    if device.memory_gib is not None:
        assert held_gib < 0.65 * device.memory_gib  # the rest is for activations


def test_counts_are_those_that_the_models_authors_published() -> None:
    """In billions, from the model cards. Qwen's 3.3 is cut, not rounded: 3.353 would round to 3.4."""
    mixtral = count_parameters(load_config(CONFIGS / "mixtral_8x7b.yaml", []))
    qwen = count_parameters(load_config(CONFIGS / "qwen3_30b_a3b.yaml", []))
    assert (round(mixtral.total / 1e9, 1), round(mixtral.active / 1e9, 1)) == (46.7, 12.9)
    assert (round(qwen.total / 1e9, 1), math.floor(qwen.active / 1e8) / 10) == (30.5, 3.3)


def test_qwen3_states_the_size_of_its_logits() -> None:
    config = load_config(CONFIGS / "qwen3_30b_a3b.yaml", [])
    tokens = config.train.micro_batch_size * config.train.sequence_length
    assert round(4 * tokens * config.model.vocab_size / 1e9, 1) == 5.0


def test_the_dense_twin_does_the_same_work_per_token() -> None:
    sparse = load_config(CONFIGS / "tiny_cpu.yaml", [])
    dense = load_config(CONFIGS / "tiny_cpu_dense.yaml", [])
    sparse_counts, dense_counts = count_parameters(sparse), count_parameters(dense)
    assert dense.moe is None
    assert sparse_counts.active - sparse_counts.router == dense_counts.active
    same = {"name", "parallel", "model", "moe"}
    assert sparse.model_dump(exclude=same) == dense.model_dump(exclude=same)


def test_trillion_states_its_memory() -> None:
    """The arithmetic in the recipe's first comment, in GB (1e9 bytes) as written there."""
    config = load_config(CONFIGS / "trillion.yaml", [])
    topology, counts = Topology.from_config(config), count_parameters(config)
    held = counts.per_device(topology)
    assert (round(held.shared / 1e9, 2), round(held.experts / 1e9, 2)) == (13.61, 7.93)
    assert round(counts.experts / 1e9, 1) == 1014.7
    assert (round(2 * held.shared / 1e9, 1), round(2 * held.experts / 1e9, 1)) == (27.2, 15.9)
    assert round(16 * held.shared / topology.data / 1e9, 1) == 0.1
    assert round(16 * held.experts / topology.expert_data / 1e9, 1) == 7.9
    assert round(4 * held.total / 1e9, 1) == 86.2
    train, model = config.train, config.model
    tokens = train.micro_batch_size * train.sequence_length
    assert round(tokens * model.hidden_size * 2 * model.num_layers / 1e9, 1) == 14.3
    # fp32, and one chunk's share in bf16
    assert round(model.vocab_size * model.hidden_size * (4 + 2) / 1e9, 1) == 7.0
