"""The console line, letter by letter."""

from __future__ import annotations

import pytest

from dsmoe.metrics.console import console_line

DENSE = {
    "train/loss": 7.04123,
    "optim/grad_norm": 0.8449,
    "optim/lr": 2.4e-4,
    "throughput/tokens_per_second": 412_345.0,
    "throughput/step_seconds": 34_860 / 19_880,
    "memory/peak_gib": 61.23,
}
MOE = {"moe/balance_loss": 1.0126, "moe/dropped_percent": 0.0, "moe/load_max_over_mean": 1.4199}
MFU = {"throughput/mfu_percent": 38.149, "throughput/mfu_percent_causal": 36.04}


def test_moe_with_everything_is_the_line_in_the_documentation() -> None:
    assert console_line({**DENSE, **MOE, **MFU}, 120, 20_000, 139.8) == (
        "step 120/20000 0.6% loss 7.0412 gnorm 0.84 lr 2.40e-04 bal 1.013 drop 0.00% max/mean 1.42 "
        "412.3k tok/s MFU 38.1% (causal 36.0%) mem 61.2/139.8 GiB eta 9h41m"
    )


def test_moe_on_unknown_hardware() -> None:
    assert console_line({**DENSE, **MOE}, 120, 20_000, None) == (
        "step 120/20000 0.6% loss 7.0412 gnorm 0.84 lr 2.40e-04 bal 1.013 drop 0.00% max/mean 1.42 "
        "412.3k tok/s mem 61.2 GiB eta 9h41m"
    )


def test_dense() -> None:
    assert console_line({**DENSE, **MFU}, 120, 20_000, 139.8) == (
        "step 120/20000 0.6% loss 7.0412 gnorm 0.84 lr 2.40e-04 412.3k tok/s "
        "MFU 38.1% (causal 36.0%) mem 61.2/139.8 GiB eta 9h41m"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (34_860, "9h41m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (12 * 86_400 + 5 * 3600, "12d05h"),
    ],
)
def test_eta_has_the_two_largest_units(seconds: float, text: str) -> None:
    metrics = {**DENSE, "throughput/step_seconds": seconds / 4}
    assert console_line(metrics, 6, 10, None).endswith(f" GiB eta {text}")


def test_after_the_last_step_nothing_is_left() -> None:
    line = console_line(DENSE, 10, 10, None)
    assert line.startswith("step 10/10 100.0% ")
    assert line.endswith(" eta 0s")


@pytest.mark.parametrize(
    ("rate", "text"), [(950.4, "950"), (1000, "1.0k"), (412_345, "412.3k"), (2_500_000, "2.5M"), (3.21e9, "3.2G")]
)
def test_rates_are_short(rate: float, text: str) -> None:
    assert f" {text} tok/s " in console_line({**DENSE, "throughput/tokens_per_second": rate}, 1, 10, None)


@pytest.mark.parametrize(("rate", "text"), [(999.4, "999"), (999_960, "1.0M"), (999_960_000, "1.0G")])
def test_rates_are_never_a_thousand_of_their_unit(rate: float, text: str) -> None:
    assert f" {text} tok/s " in console_line({**DENSE, "throughput/tokens_per_second": rate}, 1, 10, None)
