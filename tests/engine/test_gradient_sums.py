"""bf16 gradients are summed in fp32, over micro-batches and over ranks: against float64 sums of the same gradients."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import nn

from dsmoe import Groups, Topology, initialize
from dsmoe.config.schema import Config
from dsmoe.engine.gradient_sums import sum_in_fp32
from dsmoe.engine.optimizer_state import fragments, inner_optimizer
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.helpers.small_runs import small_config

FP32_ROUNDING = 2e-6
"""Relative; 512 times 2^-24 would be 3e-5 if every rounding went the same way."""
BUCKET = {"zero_optimization": {"reduce_bucket_size": 200}}
"""Elements: less than a matrix has, and more than a vector."""


class Mixed(nn.Module):
    """A dense matrix, vectors, a router, experts, and a matrix that no token passes."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.sparse = moe_layer(
            16, num_experts=4, ep_size=expert, k=2, expert_ffn_size=16, seed=3, capacity_factor=None
        )
        self.unused = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, aux, _ = self.sparse(self.dense(x))
        return output.float().square().mean() + aux


def make(config: Config) -> tuple[Mixed, DeepSpeedEngine, Groups]:
    groups = Groups(Topology.from_config(config))
    torch.manual_seed(0)
    model = Mixed(groups.topology.expert)
    engine, *_ = initialize(model=model, config=config, groups=groups)
    return model, engine, groups


def micro_batches(model: Mixed) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    while True:
        yield torch.randn(8, 16, generator=generator).to(model.dense.weight.dtype)


def exact_sums(model: Mixed) -> dict[str, torch.Tensor]:
    """Float64 sums of each parameter's gradients, by its name; every backward pass adds to them."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(partial(add_to, sums[name]))
    return sums


def add_to(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total += gradient.double()


def errors(config: Config) -> dict[str, float]:
    """How far one optimizer step's gradients and norm are from float64 sums, relative; the worst parameter's."""
    model, engine, groups = make(config)
    exact = exact_sums(model)
    found: dict[int, torch.Tensor] = {}

    def take(*_: object) -> None:  # ZeRO steps one parameter group after the other
        for fragment in (fragment for fragment in fragments(engine) if fragment.master.grad is not None):
            whole = found.setdefault(id(fragment.parameter), torch.zeros(fragment.parameter.numel()))
            whole[fragment.start :][: fragment.numel] = fragment.view(fragment.master.grad)

    inner_optimizer(engine).register_step_pre_hook(take)
    for x in micro_batches(model):
        engine.backward(engine(x))
        engine.step()
        if engine.global_steps:
            break

    worst = square = 0.0
    for name, parameter in model.named_parameters():
        kind = "expert_data" if hasattr(parameter, "group_name") else "data"
        got = found.get(id(parameter), torch.zeros(parameter.numel())).double().view_as(parameter)
        for tensor in (exact[name], got):  # each rank has a fragment
            dist.all_reduce(tensor, group=groups.handle(kind))
        if config.parallel.zero_stage == 0:  # each rank has all of it
            got /= dist.get_world_size(groups.handle(kind))
        exact[name] /= dist.get_world_size()
        assert name.startswith("unused") or exact[name].norm() > 0
        worst = max(worst, float((got - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)))
        part = exact[name].square().sum()
        if kind == "expert_data":
            dist.all_reduce(part, group=groups.handle("expert"))
        square += float(part)
    return {"gradient": worst, "norm": abs(float(engine.get_global_grad_norm()) / square**0.5 - 1)}


def config_of(
    folder: Path,
    ranks: int,
    stage: int,
    micro_batches: int,
    deepspeed: dict[str, Any] | None = None,
    offload: bool = False,
) -> Config:
    return small_config(
        folder,
        ranks=ranks,
        expert=2,
        zero_stage=stage,
        train={"precision": "bf16", "batch_tokens": micro_batches * ranks * 32},
        optimizer={"grad_clip": 0.0, "offload": offload},
        deepspeed=deepspeed or {},
    )


def assert_fp32_sums(ranks: int, *configs: Config) -> None:
    for of_rank in run_ranks(ranks, errors_of_each, configs):
        for off in of_rank:
            assert off["gradient"] < FP32_ROUNDING, of_rank
            assert off["norm"] < FP32_ROUNDING, of_rank


def errors_of_each(configs: Sequence[Config]) -> list[dict[str, float]]:
    return [errors(config) for config in configs]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_and_norm_are_fp32_sums(stage: int, tmp_path: Path) -> None:
    counts = (1, 8, 64, 512)
    assert_fp32_sums(2, *(config_of(tmp_path, 2, stage, n, BUCKET if stage else None) for n in counts))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_three_data_ranks_of_every_expert(stage: int, tmp_path: Path) -> None:
    """bf16 cannot divide by 3 without rounding."""
    assert_fp32_sums(6, config_of(tmp_path, 6, stage, 2))


@pytest.mark.parametrize("stage", [1, 2])
def test_an_offloaded_optimizer(stage: int, tmp_path: Path) -> None:
    assert_fp32_sums(2, config_of(tmp_path, 2, stage, 8, offload=True))


def bytes_between_micro_batches(config: Config) -> tuple[int, int, int]:
    """What the first of two micro-batches leaves, and the parameters that are used: shared ones, experts."""
    model, engine, _ = make(config)
    batches = micro_batches(model)
    for x in (next(batches), next(batches)):  # a whole step: the optimizer has its state
        engine.backward(engine(x))
        engine.step()
    before = live_bytes(model)
    engine.backward(engine(next(batches)))
    engine.step()
    used = [(name, p) for name, p in model.named_parameters() if not name.startswith("unused")]
    experts = sum(p.numel() for _, p in used if hasattr(p, "group_name"))
    return live_bytes(model) - before, sum(p.numel() for _, p in used) - experts, experts


def live_bytes(model: nn.Module) -> int:
    """Of all tensors that Python knows, and of the gradients, which it may not have looked at."""
    gc.collect()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with warnings.catch_warnings():  # looking at all objects wakes deprecated ones
        warnings.simplefilter("ignore")
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in (*tensors, *gradients)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_that_gradients_occupy_between_micro_batches(stage: int, tmp_path: Path) -> None:
    """Those of the table in `dsmoe.engine.gradient_sums`, with two data ranks and one of each expert."""
    config = config_of(tmp_path, 2, stage, 2, BUCKET if stage else None)
    for found, shared, experts in run_ranks(2, bytes_between_micro_batches, config):
        bucket = 4 * 200 if stage == 1 else 0  # kept until the reduction
        expected = 4 * (shared + experts) + bucket if stage < 2 else 4 * (shared / 2 + experts)
        assert expected <= found <= expected + 512, (found, shared, experts)


def test_uses_of_one_weight_in_a_micro_batch() -> None:
    """Chunks of an exchange, or a shared layer: bf16 has no 257."""
    module = nn.Linear(1, 2, bias=False).bfloat16()
    sum_in_fp32(SimpleNamespace(module=module, optimizer=None))  # type: ignore[arg-type]
    (module.weight * 256 + module.weight + module.weight).sum().backward()
    assert module.weight.grad.tolist() == [[258.0], [258.0]]
