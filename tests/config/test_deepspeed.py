from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.deepspeed import FREE_KEYS, FREE_ZERO_KEYS, OWNED_KEYS, REFUSED_KEYS, to_deepspeed

from .recipes import load


def test_the_generated_config_in_full(tmp_path: Path) -> None:
    assert to_deepspeed(load(tmp_path), accumulation_steps=2) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 1,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 250_000_000,
            "overlap_comm": True,
        },
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def test_fp32_switches_bf16_off(tmp_path: Path) -> None:
    assert to_deepspeed(load(tmp_path, "train.precision=fp32"), 1)["bf16"] == {"enabled": False}


def test_without_zero_deepspeed_neither_shards_nor_clips(tmp_path: Path) -> None:
    generated = to_deepspeed(load(tmp_path, "parallel.zero_stage=0", "optimizer.grad_clip=0.5"), 1)
    assert generated["zero_optimization"] == {"stage": 0}
    assert generated["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2])
def test_with_zero_deepspeed_clips(tmp_path: Path, stage: int) -> None:
    generated = to_deepspeed(load(tmp_path, f"parallel.zero_stage={stage}", "optimizer.grad_clip=0.5"), 1)
    assert generated["zero_optimization"]["stage"] == stage
    assert generated["gradient_clipping"] == 0.5


def test_nothing_overlaps_on_the_cpu(tmp_path: Path) -> None:
    assert to_deepspeed(load(tmp_path, "cluster.device=cpu"), 1)["zero_optimization"]["overlap_comm"] is False


def test_the_users_keys_are_merged_mapping_by_mapping(tmp_path: Path) -> None:
    section = (
        "{zero_optimization: {overlap_comm: false, reduce_bucket_size: 1e6}, wall_clock_breakdown: true, aio: [1]}"
    )
    generated = to_deepspeed(load(tmp_path, f"deepspeed={section}"), 1)
    assert generated["zero_optimization"] == {
        "stage": 1,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": 1e6,
    }
    assert generated["wall_clock_breakdown"] is True
    assert generated["aio"] == [1]


def test_the_result_shares_nothing_with_the_config(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed={aio: {b: [1]}}")
    to_deepspeed(config, 1)["aio"]["b"].append(2)
    assert config.deepspeed == {"aio": {"b": [1]}}


def test_every_generated_key_that_decides_the_training_is_owned(tmp_path: Path) -> None:
    free = {"wall_clock_breakdown", "zero_optimization"}
    assert set(to_deepspeed(load(tmp_path), 1)) - free <= set(OWNED_KEYS)


class Asked(dict):
    """Remembers which keys anyone asked for."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.names: set[str] = set()

    def __copy__(self) -> Asked:
        return self

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self  # `name in config.keys()` is a question as well


def test_the_known_keys_are_those_that_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.runtime import config as deepspeed_config

    asked = Asked(to_deepspeed(load(tmp_path), 1))
    deepspeed_config.DeepSpeedConfig(asked)
    read = asked.names - set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(FREE_KEYS) == read - set(OWNED_KEYS) - set(REFUSED_KEYS)


def test_every_key_of_zero_is_known_and_no_other_is_free() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    said = [pattern for pattern in (*OWNED_KEYS, *REFUSED_KEYS) if pattern.startswith("zero_optimization.")]
    others = {name for name in names if not any(fnmatchcase(f"zero_optimization.{name}", pattern) for pattern in said)}
    assert set(FREE_ZERO_KEYS) == others


def test_deepspeed_takes_every_free_key_of_zero(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = {name: DeepSpeedZeroConfig.model_fields[name].default for name in FREE_ZERO_KEYS} | {"overlap_comm": True}
    config = load(tmp_path, *(f"deepspeed.zero_optimization.{key}={json.dumps(v)}" for key, v in values.items()))
    taken = DeepSpeedZeroConfig(**to_deepspeed(config, 1)["zero_optimization"])
    assert {name: getattr(taken, name) for name in FREE_ZERO_KEYS} == values


def test_an_offloaded_optimizer(tmp_path: Path) -> None:
    generated = to_deepspeed(load(tmp_path, "optimizer.offload=true"), 1)
    assert generated["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert generated["zero_force_ds_cpu_optimizer"] is False
    on_cpu = to_deepspeed(load(tmp_path, "optimizer.offload=true", "cluster.device=cpu"), 1)
    assert on_cpu["zero_optimization"]["offload_optimizer"]["pin_memory"] is False


def test_deepspeed_accepts_it(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig  # slow to import, and only this test needs it

    accepted = DeepSpeedConfig(to_deepspeed(load(tmp_path, "optimizer.grad_clip=0.5"), 3))
    assert accepted.steps_per_print is None
    assert accepted.bfloat16_config.enabled
    assert (accepted.zero_config.stage, accepted.zero_config.overlap_comm) == (1, True)
    assert (accepted.gradient_clipping, accepted.gradient_accumulation_steps) == (0.5, 3)
    assert accepted.train_batch_size == 2 * 3  # one rank here
