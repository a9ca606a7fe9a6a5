"""Every key has the effect that changing it has on a run that has begun."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dsmoe.config import UserError, dump_config
from dsmoe.config.dump import flatten, json_schema, with_nulls_resolved
from dsmoe.config.effects import effect_of, is_free, level_of_change, tensor_part, value_at
from dsmoe.config.paths import is_path
from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Effect, Section
from dsmoe.plan.plan import Plan
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.run_folder import check_run_folder, run_folder
from tests.helpers.checkpoint_runs import MODEL, layout_config, save_between


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        sections = [
            part for part in _parts(field.annotation) if issubclass(part, Section) and part.__name__ != "Device"
        ]
        if sections:
            yield from leaves(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _parts(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


@pytest.mark.parametrize(("key", "field"), leaves(Config))
def test_every_key_has_one_effect(key: str, field: FieldInfo) -> None:
    assert len([mark for mark in field.metadata if isinstance(mark, Effect)]) == 1, key


def test_the_json_schema_says_the_effect_of_every_key() -> None:
    schema = json_schema()
    for key, field in leaves(Config):
        (effect,) = (mark for mark in field.metadata if isinstance(mark, Effect))
        *sections, name = key.split(".")
        node = schema
        for section in sections:
            node = schema["$defs"][_reference(node["properties"][section])]
        assert node["properties"][name]["x-effect"] == effect.level, key


def _reference(schema: dict[str, Any]) -> str:
    (reference,) = re.findall(r"'#/\$defs/(\w+)'", str(schema))
    return str(reference)


def test_the_documented_effect_of_every_key_is_its_effect() -> None:
    """The table has every key, or the key's section."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    documented = {}
    for level, keys in re.findall(r"^\| `(tensor|math|step|free)` \| ([^|]+) \|", text, re.MULTILINE):
        documented |= dict.fromkeys(re.findall(r"`([^`]+)`", keys), level)
    for key, field in leaves(Config):
        (effect,) = (mark for mark in field.metadata if isinstance(mark, Effect))
        sections = [documented[part] for part in _ends(key) if part in documented]
        assert sections[0] == effect.level, key
    assert set(documented) <= {part for key, _ in leaves(Config) for part in _ends(key)}


def _ends(key: str) -> list[str]:
    """Yield `a.b.c`, `a.b`, `a`."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


@pytest.mark.parametrize(
    ("key", "level"),
    {
        "moe": "tensor",
        "moe.top_k": "tensor",
        "data.sources.0.weight": "math",
        "cluster.device": "free",
        "cluster.device.memory_gib": "free",
        "deepspeed": "free",
        "deepspeed.zero_optimization.7.anything": "free",
        "optimizer.betas": "math",
        "train.batch_tokens": "step",
        "model.of_another_version": None,
        "nothing": None,
    }.items(),
)
def test_a_key_as_it_is_flattened_has_an_effect(key: str, level: str | None) -> None:
    effect = effect_of(key)
    assert (effect and effect.level) == level
    assert is_free(key) == (level == "free")


@pytest.mark.parametrize(
    ("key", "before", "after", "level"),
    [
        ("moe.balance.scope", "micro_batch", "sequence", "math"),
        ("moe.balance.scope", "sequence", "global", "step"),
        ("moe.balance.bias_update_rate", 0.1, 0.2, "math"),
        ("moe.balance.bias_update_rate", 0.1, 0.0, "tensor"),
        ("moe.balance.bias_update_rate", 0.1, "absent", "tensor"),
        ("moe.capacity.target_drop_percent", 1.0, 2.0, "math"),
        ("moe.capacity.target_drop_percent", None, 2.0, "step"),
        ("moe.of_another_version", 1, 2, "tensor"),
        ("model.of_another_version", 1, 2, "tensor"),
    ],
)
def test_some_values_decide_whether_there_are_tensors(key: str, before: object, after: object, level: str) -> None:
    assert level_of_change(key, before, after) == level
    assert level_of_change(key, after, before) == level


def test_a_key_of_the_model_that_only_another_version_has_counts(tmp_path: Path) -> None:
    config = layout_config(tmp_path).model_dump(mode="json")
    ours = tensor_part(config)
    config["model"] |= {"window": 8, "init_std": 0.5}
    config["moe"]["of_another_version"] = 1
    assert tensor_part(config) == {**ours, "model.window": 8}


@pytest.mark.parametrize("key", ["model", "moe.top_k", "moe.balance.scope", "moe.balance", "moe"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_foreign_config_has_no_tensor_part(key: str, weights_only: bool, tmp_path: Path) -> None:
    config = layout_config(tmp_path).model_dump(mode="json")
    *sections, name = key.split(".")
    (value_at(config, ".".join(sections)) if sections else config)[name] = "x"
    if name in ("top_k", "scope"):
        del value_at(config, ".".join(sections))[name]
    with pytest.raises((KeyError, TypeError, AttributeError)):
        tensor_part(config, weights_only)


def test_settings_of_tensors_that_may_begin_anew_are_left_out_for_weights(tmp_path: Path) -> None:
    config = layout_config(tmp_path).model_dump(mode="json")
    whole, weights = tensor_part(config), tensor_part(config, weights_only=True)
    assert whole == {
        **weights,
        "moe.balance.scope is global": True,
        "moe.capacity.target_drop_percent is set": False,
    }
    assert weights["moe.balance.bias_update_rate is above 0"] is True
    assert list(tensor_part({**config, "moe": None}))[-1] == "moe"


# The meaning of the effects, tested with other values of every key on a run that has a checkpoint.

_PLACES = ("name", "runs_dir")
"""Keys that decide the run folder; in another folder there is no run to resume."""
_BY_CONTENTS = ("data.tokenizer", "data.sources.", "data.seed", "data.validation_fraction")
"""Keys compared by content rather than value: tests/train/test_identity.py and test_changed.py."""
_VALUES: tuple[Any, ...] = (
    *(True, False, None, 0, 1, 2, 64, 2048, 0.25, 50.0, "always", [0.8, 0.9]),
    *({"zero_optimization": {"reduce_bucket_size": 1}}, {"memory_gib": 3.0, "peak_tflops": 4.0}),
)
_TRIED = [(key, field) for key, field in leaves(Config) if key not in _PLACES and not key.startswith(_BY_CONTENTS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Return the config of a run that was started and then resumed on more devices, and its checkpoint."""
    folder = tmp_path_factory.mktemp("effects")
    balance = {"scope": "sequence", "bias_update_rate": 0.01}
    capacity = {"factor": 1.5, "target_drop_percent": 5.0}
    sections = {
        "moe": {**MODEL["moe"], "balance": balance, "capacity": capacity},
        "train": {"batch_tokens": 32 * 32},
    }
    config = layout_config(folder, **sections)
    trained = config.model_copy(update={"runs_dir": str(run_folder(config))})
    run_ranks(1, save_between, trained, 2, 0)
    config = layout_config(folder, 4, **sections)
    (run_folder(config) / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return config, run_folder(config) / "checkpoints" / "step_00000002"


def others(config: Config, key: str, field: FieldInfo) -> Iterator[Config]:
    """Yield the config with other values of a key, each valid by itself, with steps after the checkpoint."""
    literals = [value for part in _nested(field.annotation) if get_origin(part) is Literal for value in get_args(part)]
    *sections, name = key.split(".")
    for value in (*literals, *_VALUES):
        tree = config.model_dump()
        (value_at(tree, ".".join(sections)) if sections else tree)[name] = value
        with suppress(ValidationError, UserError, AssertionError):
            other = Config.model_validate(tree)
            is_other = with_nulls_resolved(flatten(other.model_dump())) != with_nulls_resolved(
                flatten(config.model_dump())
            )
            if is_other and Plan.from_config(other).batch.steps > 2:
                yield other


def _nested(annotation: object) -> Iterator[object]:
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _nested(part)


def observed(config: Config, checkpoint: Path, key: str) -> str:
    """Return the effect of a config's difference from the run, by the messages of the starts with it."""

    def start_notes(**changed: Any) -> tuple[str, ...]:
        return check_run_folder(Plan.from_config(config.model_copy(update=changed))).notes

    def begin_command(**keys: str) -> dict[str, Any]:
        return {"name": "another", "checkpoint": config.checkpoint.model_copy(update=keys)}

    with suppress(UserError):
        notes = start_notes()
        assert is_path(key, value_at(config.model_dump(), key)) or names(notes, "the run was last started", key)
        return "free"
    with suppress(UserError):
        assert names(start_notes(**begin_command(resume=str(checkpoint))), f"{checkpoint} was saved", key)
        return "math"
    with suppress(UserError):
        start_notes(**begin_command(weights_from=str(checkpoint)))
        return "step"
    return "tensor"


def names(notes: tuple[str, ...], since: str, key: str) -> bool:
    """Return whether messages report that the key, or a part of its value, has changed."""
    return any(note.startswith((f"changed since {since}: {key},", f"changed since {since}: {key}.")) for note in notes)


ADVICE = {
    "math": "goes on from its newest checkpoint",
    "step": "begins with its newest weights",
    "tensor": "or give this run another name (name=small-2)",
}


@pytest.mark.parametrize(("key", "field"), _TRIED, ids=[key for key, _ in _TRIED])
def test_a_start_does_with_another_value_what_the_effect_says(
    key: str, field: FieldInfo, run: tuple[Config, Path]
) -> None:
    config, checkpoint = run
    levels = set()
    for other in others(config, key, field):
        level = level_of_change(key, *(value_at(one.model_dump(), key) for one in (config, other)))
        assert observed(other, checkpoint, key) == level
        if level != "free":
            with pytest.raises(UserError, match=re.escape(ADVICE[level])):
                check_run_folder(Plan.from_config(other))
        levels.add(level)
    (effect,) = (mark for mark in field.metadata if isinstance(mark, Effect))
    assert levels == {effect.level} | ({effect.switch.level} if effect.switch else set())


def test_a_model_without_experts_is_another(run: tuple[Config, Path]) -> None:
    config, checkpoint = run
    assert observed(config.model_copy(update={"moe": None}), checkpoint, "moe") == "tensor"
