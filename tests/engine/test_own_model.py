"""A user's own model around `dsmoe.MoE` layers: on every layout that of one rank, however its parts were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dsmoe
from dsmoe.config.schema import Config
from dsmoe.parallel import Groups
from dsmoe.parallel.mappings import enter_sequence_parallel_region, leave_sequence_parallel_region
from dsmoe.parity.training import TOLERANCES, Training, difference, whole_weights
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer
from tests.helpers.small_runs import small_config

STEPS = 4


class Net(nn.Module):
    """Tied embeddings and two MoE layers of different sizes, the second with an `ep_size` of its own."""

    def __init__(self, groups: Groups, second_ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # what all ranks have is made differently, and has to become the same
        topology, self.group = groups.topology, groups.tensor_group()
        self.embedding = nn.Embedding(264, 32)
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(2))
        common = {"capacity_factor": None, "eval_capacity_factor": None, "tensor_group": self.group, "aux_loss": 0.02}
        first = {"ep_size": topology.expert, "expert_tensor": topology.expert_tensor, "shared_expert_ffn_size": 16}
        second = {"ep_size": second_ep_size, "expert_ffn_size": 24, "z_loss": 0.01}
        self.layers = nn.ModuleList(
            [
                moe_layer(32, num_experts=8, k=2, seed=1, expert_ffn_size=16, **first, **common),
                moe_layer(32, num_experts=4, k=1, seed=2, **second, **common),
            ]
        )
        for layer in self.layers:
            layer.reset_experts(0.2, 0.2)
        self.head = nn.Linear(32, 264, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens_BS[:, :-1])
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + leave_sequence_parallel_region(
                layer(enter_sequence_parallel_region(norm(x), self.group))[0], self.group
            )
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


def train_own(config: Config, second_ep_size: int) -> Training:
    groups = Groups(Topology.from_config(config))
    model = Net(groups, second_ep_size)
    engine, _, loader, _ = dsmoe.initialize(model=model, config=config, groups=groups)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for tokens in loader.micro_batches(step):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    weights, apart = whole_weights(model)
    return Training(losses, norms, losses[-1], weights, apart, config.optimizer.lr * STEPS)


def config_of(folder: Path, ranks: int, zero_stage: int, **parallel: int) -> Config:
    optimizer = {"eps": 1e-6, "grad_clip": 0.5}
    expert = parallel.pop("expert", 1)
    layout = {"ranks": ranks, "expert": expert, "zero_stage": zero_stage}
    return small_config(folder, **layout, parallel=parallel, optimizer=optimizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Training:
    return run_ranks(1, train_own, config_of(folder, 1, 1), 1)[0]


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "parallel", "second_ep_size"),
    [
        (2, 0, {"expert": 2}, 1),
        (2, 0, {"expert": 1}, 2),
        (2, 0, {"expert": 2, "tensor": 2}, 1),
        (2, 1, {"expert": 2, "tensor": 2}, 2),
        (4, 2, {"expert": 2, "tensor": 2, "expert_tensor": 2}, 4),
    ],
)
def test_it_trains_as_on_one_rank(
    ranks: int, zero_stage: int, parallel: dict[str, int], second_ep_size: int, folder: Path, reference: Training
) -> None:
    config = config_of(folder, ranks, zero_stage, **parallel)
    off = difference(run_ranks(ranks, train_own, config, second_ep_size), reference)
    assert not off.beyond(TOLERANCES["fp32"]), off


def two_engines(configs: list[Config]) -> list[list[float]]:
    """The gradient norms of engines that take their steps in turn."""
    engines = []
    for config in configs:
        groups = Groups(Topology.from_config(config))
        model = dsmoe.build_model(config, groups)
        engine, _, loader, _ = dsmoe.initialize(model=model, config=config, groups=groups)
        engines.append((engine, loader))
    norms: list[list[float]] = [[] for _ in engines]
    for step in range(STEPS):
        for (engine, loader), found in zip(engines, norms, strict=True):
            for tokens in loader.micro_batches(step):
                engine.backward(engine(tokens).mean())
                engine.step()
            found.append(float(engine.get_global_grad_norm()))
    return norms


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_engines_of_two_layouts_train_side_by_side(zero_stage: int, folder: Path) -> None:
    """DeepSpeed keeps one registry of groups for all engines of a process."""
    whole, split = config_of(folder, 2, zero_stage, expert=2), config_of(folder, 2, zero_stage, expert=2, tensor=2)
    alone = run_ranks(2, two_engines, [whole])[0][0]
    for first, second in run_ranks(2, two_engines, [whole, split]):
        assert first == pytest.approx(alone, rel=1e-5)
        assert second == pytest.approx(alone, rel=1e-5)
