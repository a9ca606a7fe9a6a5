from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.deepspeed import FREE_KEYS, OWNED_KEYS, REFUSED_KEYS, Kind, deepspeed_problems, to_deepspeed
from dsmoe.config.errors import UserError
from dsmoe.plan.plan import Plan
from tests.helpers.recipes import VALID, load, problems_of, write

FREE_ZERO_KEYS = FREE_KEYS["zero_optimization"]


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
    zero = "{overlap_comm: false, reduce_bucket_size: 1e6}"
    section = f"{{zero_optimization: {zero}, wall_clock_breakdown: true, comms_logger: {{prof_ops: [a]}}}}"
    generated = to_deepspeed(load(tmp_path, f"deepspeed={section}"), 1)
    assert generated["zero_optimization"] == {
        "stage": 1,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": 1e6,
    }
    assert generated["wall_clock_breakdown"] is True
    assert generated["comms_logger"] == {"prof_ops": ["a"]}
    assert isinstance(generated["zero_optimization"]["reduce_bucket_size"], int)  # DeepSpeed needs integers


def test_the_result_shares_nothing_with_the_config(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed={comms_logger: {prof_ops: [a]}}")
    to_deepspeed(config, 1)["comms_logger"]["prof_ops"].append("b")
    assert config.deepspeed == {"comms_logger": {"prof_ops": ["a"]}}


def test_every_generated_key_that_decides_the_training_is_owned(tmp_path: Path) -> None:
    free = {"wall_clock_breakdown", "zero_optimization"}
    assert set(to_deepspeed(load(tmp_path), 1)) - free <= set(OWNED_KEYS)


class Asked(dict):
    """A dict that records which keys were read."""

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
        return self  # `name in config.keys()` reads a key as well


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
    patterns = [pattern for pattern in (*OWNED_KEYS, *REFUSED_KEYS) if pattern.startswith("zero_optimization.")]
    others = {
        name for name in names if not any(fnmatchcase(f"zero_optimization.{name}", pattern) for pattern in patterns)
    }
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
    assert accepted.train_batch_size == 2 * 3  # the world of this test has one rank


def entries(free: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of the table, each with the kind of its values or with the keys below it."""
    for name, kind in free.items():
        yield f"{section}{name}", kind
        if not isinstance(kind, Kind):
            yield from entries(kind, f"{section}{name}.")


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


VALUES = (
    *(None, True, False, -5, -1, 0, 1, 2, 5, 7, 1.5, 1e6, 1e12, 10**400, float("nan"), float("inf"), -0.0),
    *("", "hello", "auto", "maybe", "true", "1", "5e8", "fp32", "int8", "info", "INFO", "nope", "a\0b"),
    *([], [1], ["all_reduce"], [None], ["*", "("], ["**"], {}, {"x": 1}, {"enabled": "x"}),
)


@pytest.mark.parametrize("key", [key for key, _ in entries(FREE_KEYS)])
def test_deepspeed_takes_what_the_check_lets_pass_and_the_rest_names_the_key(tmp_path: Path, key: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load(tmp_path)
    passed: list[Any] = []
    for value in VALUES:
        given = config.model_copy(update={"deepspeed": nested(key, value)})
        problems = list(deepspeed_problems(given))
        if not problems:
            DeepSpeedConfig(to_deepspeed(given, 1))
            passed.append(value)
        assert all(place.startswith(f"deepspeed.{key}") for place, _ in problems)
        if not isinstance(value, dict):
            assert [message.partition(f"{key}: expected ")[0] for _, message in problems] in ([], ["deepspeed."])
    assert passed
    assert None not in passed


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("{zero_optimization: {reduce_bucket_size: hello}}", "zero_optimization.reduce_bucket_size", '"hello"'),
        ("{zero_optimization: {reduce_bucket_size: 0}}", "zero_optimization.reduce_bucket_size", "0"),
        ("{zero_optimization: {overlap_comm: maybe}}", "zero_optimization.overlap_comm", '"maybe"'),
        ("{zero_optimization: {allgather_bucket_size: 5}}", "zero_optimization.allgather_bucket_size", "5"),
        ("{flops_profiler: null}", "flops_profiler", "null"),
        ("{comms_logger: {verbose: x}}", "comms_logger.verbose", '"x"'),
        ("{data_types: 5}", "data_types", "5"),
        ("{log_level: nope}", "log_level", '"nope"'),
        ("{timers: {throughput: 3}}", "timers.throughput", "3"),
    ],
)
def test_a_wrong_value_is_a_problem_of_the_config_with_its_place(
    tmp_path: Path, section: str, key: str, value: str
) -> None:
    (problem,) = problems_of(write(tmp_path, VALID + f"deepspeed: {section}\n"))
    assert problem.startswith(f"deepspeed.{key}: expected ")
    assert f", got {value}" in problem
    assert problem.endswith(f"(x.yaml:{VALID.count(chr(10)) + 1})")


def test_the_keys_in_deepspeeds_other_sections_are_those_that_it_reads() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    assert set(FREE_KEYS["comms_logger"]) == set(CommsLoggerConfig.model_fields)
    assert set(FREE_KEYS["flops_profiler"]) == set(vars(DeepSpeedFlopsProfilerConfig({})))
    assert set(FREE_KEYS["timers"]["throughput"]) == set(DeepSpeedThroughputTimerConfig.model_fields)


def test_a_later_refusal_by_deepspeed_is_one_error_that_names_the_key(tmp_path: Path) -> None:
    """DeepSpeed refuses a config that dsmoe has not checked, as a later DeepSpeed may refuse a checked one."""
    from dsmoe.engine.deepspeed_config import accepted_by_deepspeed

    config = load(tmp_path)
    plan = Plan.from_config(config)
    assert accepted_by_deepspeed(plan) == to_deepspeed(config, plan.batch.accumulation_steps)
    for section, key in (
        ({"comms_logger": {"debug": True, "verbose": "x"}, "dump_state": True}, ".comms_logger.verbose"),
        ({"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": -5}}, ".zero_optimization.reduce_buck"),
        ({"flops_profiler": None}, ".flops_profiler"),
        ({"timers": {}, "elasticity": {"a": {"b": 1}}}, ".elasticity.a.b"),
    ):
        with pytest.raises(UserError, match=rf"^deepspeed{re.escape(key)}.*: DeepSpeed refuses it: .*remove it$"):
            accepted_by_deepspeed(replace(plan, config=config.model_copy(update={"deepspeed": section})))


def test_an_error_in_dsmoes_own_config_is_no_user_error(tmp_path: Path) -> None:
    from dsmoe.engine.deepspeed_config import accepted_by_deepspeed

    plan = Plan.from_config(load(tmp_path, "deepspeed={dump_state: true}"))
    with pytest.raises(AssertionError, match="has to be greater than 0"):
        accepted_by_deepspeed(replace(plan, batch=replace(plan.batch, accumulation_steps=0)))
