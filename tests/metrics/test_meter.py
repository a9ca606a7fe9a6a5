"""What `Meter.read` returns on two ranks, with a clock that the test moves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsmoe.metrics import meter as meter_module
from dsmoe.metrics.meter import Meter
from dsmoe.moe import MoE, hold_drop_rate
from dsmoe.parallel import Groups
from dsmoe.plan import Batch, Plan, Topology
from dsmoe.plan.devices import DeviceFacts
from dsmoe.plan.flops import Flops
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.helpers.plan_configs import make_config

FLOPS = Flops(forward=10**9, attention=2 * 10**8)
KNOWN = DeviceFacts("a test's", memory_gib=1.0, peak_tflops=0.5)
UNKNOWN = DeviceFacts("cpu", memory_gib=None, peak_tflops=None)
Metrics = dict[str, float]


class Clock:
    """Stands in for the `time` module in `dsmoe.metrics.meter`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def plan_with(batch: Batch, facts: DeviceFacts | None) -> Plan:
    return replace(Plan.from_config(make_config()), batch=batch, flops=FLOPS, device=facts)


def make_meter(clock: Clock, facts: DeviceFacts | None = None, layers: list[tuple[int, MoE]] | None = None) -> Meter:
    """2 ranks x 1 sequence x 32 tokens x 1 micro-batch = 64 tokens per step."""
    meter_module.time = clock  # this process is the test's own
    batch = Batch(Topology(1, 2, expert=2), 1, 32, accumulation_steps=1, steps=10)
    return Meter(plan_with(batch, facts), layers or [], torch.device("cpu"))


def unequal_losses() -> list[float]:
    """Rank 0 has 3 tokens of loss 2, rank 1 has 5 of loss 4 in two micro-batches; then a second step."""
    rank, clock = dist.get_rank(), Clock()
    meter = make_meter(clock)
    losses = []
    for shift in (0.0, 10.0):
        clock.now += 1.0
        meter.begin_step()
        if rank == 0:
            meter.add_micro_batch(torch.full((1, 3), 2.0 + shift))
        else:
            meter.add_micro_batch(torch.full((2, 2), 4.0 + shift))
            meter.add_micro_batch(torch.full((1, 1), 4.0 + shift))
        meter.end_step(0.0)
        losses.append(meter.read(layer_detail=False)["train/loss"])
    return losses


def test_loss_is_the_sum_over_all_tokens_by_their_number() -> None:
    expected = (3 * 2 + 5 * 4) / 8
    for losses in run_ranks(2, unequal_losses):
        assert losses == [pytest.approx(expected), pytest.approx(expected + 10)]


def timed_steps() -> list[Metrics]:
    """Two log periods: 4 steps in 8 s (rank 1: 10 s), then, after a pause that does not count, 1 step in 0.5 s."""
    rank, clock = dist.get_rank(), Clock()
    meter = make_meter(clock, KNOWN)
    clock.now += 100.0
    meter.restart_clock()
    results = []
    for _ in range(4):
        meter.begin_step()
        meter.add_micro_batch(torch.ones(1, 32))
        clock.now += 2.0 + 0.5 * rank
        meter.end_step(data_wait_seconds=0.25 - 0.05 * rank)
    meter.add_stall(3.0 - rank)
    results.append(meter.read(layer_detail=False))
    meter.end_step(7.0)
    clock.now += 50.0
    meter.restart_clock()
    meter.begin_step()
    meter.add_micro_batch(torch.ones(1, 32))
    clock.now += 0.5
    meter.end_step(0.125)
    results.append(meter.read(layer_detail=False))
    return results


def test_throughput_is_of_the_slowest_rank_over_the_steps_in_between() -> None:
    for first, second in run_ranks(2, timed_steps):
        assert first["throughput/step_seconds"] == pytest.approx(10 / 4)
        assert first["throughput/tokens_per_second"] == pytest.approx(4 * 64 / 10)
        assert first["throughput/tokens_per_second_per_device"] == pytest.approx(4 * 64 / 10 / 2)
        assert first["throughput/data_wait_seconds"] == pytest.approx(0.25)
        assert first["checkpoint/stall_seconds"] == pytest.approx(3.0)
        tflops = 3 * 10**9 * 4 * 64 / 10 / 2 / 1e12
        assert first["throughput/tflops_per_device"] == pytest.approx(tflops)
        assert first["throughput/mfu_percent"] == pytest.approx(100 * tflops / 0.5)
        assert first["throughput/tflops_per_device_causal"] == pytest.approx(0.9 * tflops)
        assert first["throughput/mfu_percent_causal"] == pytest.approx(90 * tflops / 0.5)

        assert second["throughput/step_seconds"] == pytest.approx(0.5)
        assert second["throughput/tokens_per_second"] == pytest.approx(128)
        assert second["throughput/data_wait_seconds"] == pytest.approx(0.125)
        assert "checkpoint/stall_seconds" not in second


def one_step(facts: DeviceFacts | None, peak_gib: float) -> Metrics:
    clock = Clock()
    meter = make_meter(clock, facts)
    meter._peak_memory_gib = lambda: peak_gib * (1 + dist.get_rank())
    meter.begin_step()
    meter.add_micro_batch(torch.ones(1, 32))
    clock.now += 1.0
    meter.end_step(0.0)
    return meter.read(layer_detail=True)


@pytest.mark.parametrize("facts", [UNKNOWN, None])
def test_without_a_known_peak_there_is_no_mfu(facts: DeviceFacts | None) -> None:
    for metrics in run_ranks(2, one_step, facts, 3.0):
        assert "throughput/mfu_percent" not in metrics
        assert metrics["throughput/tflops_per_device"] > 0
        assert metrics["memory/peak_gib"] == 6.0, "the rank that needs most"
        assert not [name for name in metrics if name.startswith("moe/")], "a dense model"


def routed_steps() -> list[Metrics]:
    """Tokens choose experts by hand: rank 0 sends 4 to expert 0; rank 1 sends 1 to expert 0 and 3 to expert 2."""
    rank, clock = dist.get_rank(), Clock()
    groups = Groups(Topology(1, 2, expert=2))
    layer = moe_layer(8, num_experts=4, ep_size=2, expert_ffn_size=8, drop_tokens=False)
    layer.set_expert_group(groups.expert_group())
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 8))
    meter = make_meter(clock, None, [(3, layer)])
    x = torch.eye(8)[torch.tensor([0, 0, 0, 0] if rank == 0 else [0, 2, 2, 2])]
    results = []
    for detail in (False, True):
        layer(torch.eye(8)[[1, 1, 1, 1]].requires_grad_())[0].sum().backward()  # before the step begins
        meter.begin_step()
        layer.begin_step(0)
        for _ in range(2):
            layer(x.requires_grad_())[0].sum().backward()
            meter.add_micro_batch(torch.ones(1, 4))
        layer.eval()(x)
        layer.train()
        clock.now += 1.0
        meter.end_step(0.0)
        results.append(meter.read(layer_detail=detail))
    return results


def test_routing_is_counted_over_ranks_and_micro_batches_of_one_step() -> None:
    """Loads over both ranks: 5, 0, 3, 0 per micro-batch, mean 2."""
    for plain, detailed in run_ranks(2, routed_steps):
        assert plain["moe/load_max_over_mean"] == pytest.approx(2.5)
        assert plain["moe/load_cv"] == pytest.approx(math.sqrt((9 + 4 + 1 + 4) / 4) / 2)
        assert plain["moe/dead_expert_percent"] == 50.0
        assert plain["moe/dropped_percent"] == 0.0
        high, low = math.e / (math.e + 3), 1 / (math.e + 3)
        balance = (4 * high, 4 * (1 / 4 * (high + 3 * low) / 4 + 3 / 4 * (3 * high + low) / 4))
        assert plain["moe/balance_loss"] == pytest.approx(sum(balance) / 2)
        assert plain["moe/z_loss"] == pytest.approx(math.log(math.e + 3) ** 2)
        assert plain["moe/router_logit_rms"] == pytest.approx(0.5), "one logit of 1 and three of 0"
        assert not [name for name in plain if "layer_" in name]
        assert detailed["moe/dead_expert_percent"] == 50.0, "the second step starts from zero"
        assert detailed["moe/layer_003/load_max_over_mean"] == pytest.approx(2.5)


def with_held_drop_rate() -> list[Metrics]:
    """The metrics of a layer that holds a drop rate, before and after it has moved, and of one that does not."""
    results = []
    for target in (5.0, None):
        layer = moe_layer(8, num_experts=4, expert_ffn_size=8, seed=0, target_drop_percent=target)
        meter = make_meter(Clock(), None, [(3, layer)])
        for _ in range(2):
            meter.begin_step()
            layer(torch.ones(8, 8))
            meter.add_micro_batch(torch.ones(1, 8))
            meter_module.time.now += 1.0
            meter.end_step(0.0)
            results.append(meter.read(layer_detail=True))
            hold_drop_rate([layer], results[-1]["moe/dropped_percent"])
    return results


def test_the_factor_that_a_step_was_done_with_is_logged_where_it_moves() -> None:
    for first, second, *plain in run_ranks(2, with_held_drop_rate):
        assert first["moe/dropped_percent"] == pytest.approx(50.0), "8 equal tokens, 4 slots"
        assert (first["moe/capacity_factor"], second["moe/capacity_factor"]) == (1.0, 1.03)
        assert not [name for metrics in plain for name in metrics if "capacity_factor" in name]


def test_bytes_are_the_mean_of_the_ranks_in_one_step() -> None:
    """Rank 1 sends 1 row of 8 floats and rank 0 its result, in 3 forward passes and 2 backward: 5 rows for each.

    With the row goes its router weight, 3 times from rank 1, whose gradient comes back twice from rank 0.
    """
    for plain, _ in run_ranks(2, routed_steps):
        assert plain["moe/all_to_all_gib/intra"] * 2**30 == pytest.approx(5 * 8 * 4 + (3 + 2) / 2 * 4)
        assert plain["moe/all_to_all_gib/inter"] == 0.0


def begin_afresh() -> dict[str, Any]:
    """Peak memory of a real process, without a patch."""
    batch = Batch(Topology(1, 1), 1, 32, accumulation_steps=1, steps=10)
    meter = Meter(plan_with(batch, None), [], torch.device("cpu"))
    meter.begin_step()
    meter.add_micro_batch(torch.ones(1, 32))
    meter.end_step(0.0)
    return meter.read(layer_detail=False)


def test_peak_memory_of_a_cpu_process_is_its_resident_size() -> None:
    (metrics,) = run_ranks(1, begin_afresh)
    assert 0.1 < metrics["memory/peak_gib"] < 4.0
