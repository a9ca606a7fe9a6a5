import math

import pytest

from dsmoe.config.schema import Optimizer
from dsmoe.train.schedule import learning_rate


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


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_a_run_of_one_step_trains(schedule: str) -> None:
    assert rates(1, schedule=schedule)[0] == pytest.approx(1.0 if schedule == "constant" else 0.1)
