"""Learning rates equal to values computed by hand, and a registry that alone knows the schedules' names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest

from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.dump import flatten, with_nulls_resolved
from dsmoe.config.errors import UserError
from dsmoe.config.load import load_config
from dsmoe.config.schedules import SCHEDULES, Schedule, learning_rate
from dsmoe.config.schema import Config, Optimizer
from tests.helpers.recipes import VALID, write


def rates(steps: int, **options: object) -> list[float]:
    optimizer = Optimizer.model_validate({"lr": 1.0, "min_lr": 0.1, **options})
    return [learning_rate(optimizer, steps, step) for step in range(steps)]


def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step() -> None:
    assert rates(8, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_reaches_the_floor_at_the_last_step() -> None:
    assert rates(12, schedule="linear", warmup_steps=2)[1:] == pytest.approx([1.0 - 0.09 * i for i in range(11)])


def test_cosine_is_half_way_down_in_the_middle_and_at_the_floor_at_the_end() -> None:
    values = rates(100, schedule="cosine")
    assert values[49] == pytest.approx((1.0 + 0.1) / 2)
    assert values[-1] == pytest.approx(0.1)
    assert values[24] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_and_falls_over_the_decay_steps_only() -> None:
    values = rates(10, schedule="wsd", warmup_steps=2, decay_steps=3)
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1])


def test_wsd_decays_over_a_fifth_by_default() -> None:
    values = rates(20, schedule="wsd")
    assert values[15] == 1.0
    assert values[16] < 1.0
    assert values[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_trains(schedule: str) -> None:
    assert rates(1, schedule=schedule)[0] == pytest.approx(1.0 if schedule == "constant" else 0.1)


# The registry


def test_every_name_of_the_schema_has_an_entry_and_the_other_way_round() -> None:
    assert set(get_args(Optimizer.model_fields["schedule"].annotation)) == set(SCHEDULES)


def with_schedule(folder: Path, **optimizer: object) -> Config:
    """Return a config whose `optimizer` has these options, which the schema need not allow."""
    config = load_config(write(folder, VALID))
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})


def test_a_schedule_is_an_entry_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square = Schedule(lambda peak, floor, progress: peak + (floor - peak) * progress**2, takes_decay_steps=True)
    monkeypatch.setitem(SCHEDULES, "square", square)
    options = {"schedule": "square", "lr": 1.0, "min_lr": 0.0, "warmup_steps": 2}
    given = with_schedule(tmp_path, **options, decay_steps=4)
    rates = [learning_rate(given.optimizer, 8, step) for step in range(8)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1 - 1 / 16, 1 - 4 / 16, 1 - 9 / 16, 0.0]
    assert cross_field_problems(given) == []
    left_open = with_schedule(tmp_path, **options)
    assert with_nulls_resolved(flatten(left_open.model_dump()))["optimizer.decay_steps"] == 20
    too_long = with_schedule(tmp_path, **options, decay_steps=99)
    assert [key for key, _ in cross_field_problems(too_long)] == ["optimizer.decay_steps"]
    unused = with_schedule(tmp_path, schedule="linear", decay_steps=4)
    assert [problem for _, problem in cross_field_problems(unused)] == [
        "optimizer.decay_steps (4) would be unused: optimizer.schedule is linear; remove it or set "
        "optimizer.schedule: wsd or square"
    ]


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    unknown = with_schedule(tmp_path, schedule="cosin")
    with pytest.raises(UserError, match=r"optimizer\.schedule must be one of cosine, wsd, .*, not 'cosin'"):
        learning_rate(unknown.optimizer, 8, 0)


@pytest.mark.parametrize("name", ["cosin", None, 3, ["wsd"]])
def test_a_checkpoint_of_another_schedule_is_shown_as_it_is(name: object, tmp_path: Path) -> None:
    flat = {**flatten(load_config(write(tmp_path, VALID)).model_dump()), "optimizer.schedule": name}
    assert with_nulls_resolved(flat)["optimizer.decay_steps"] is None
