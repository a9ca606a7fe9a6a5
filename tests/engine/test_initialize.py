"""What `dsmoe.initialize` tells DeepSpeed: parameter groups, generated config, clipping."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsmoe import Groups, MoE, Topology
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource
from dsmoe.engine import clipping
from dsmoe.engine.clipping import clip_gradients
from dsmoe.engine.optimizer_state import fragments
from dsmoe.engine.parameter_groups import parameter_groups
from dsmoe.model import build_model
from dsmoe.plan.plan import Plan
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.initialize import initialize, prepare_data
from dsmoe.train.trainer import make_trainer as assemble
from tests.helpers.layer_options import moe_layer
from tests.helpers.small_runs import make_trainer, small_config, this_rank


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.sparse = MoE(8, expert=nn.Linear(8, 8), num_experts=4, k=2)


def test_groups_separate_experts_and_decay_only_matrices() -> None:
    model = Mixed()
    groups = parameter_groups(model, weight_decay=0.1)
    named = {id(p): name for name, p in model.named_parameters()}
    found = {
        (group["name"], group["moe"], group["weight_decay"]): sorted(named[id(p)] for p in group["params"])
        for group in groups
    }
    experts = "sparse.deepspeed_moe.experts.deepspeed_experts"
    assert found == {
        ("matrices", False, 0.1): ["dense.weight", "sparse.deepspeed_moe.gate.wg.weight"],
        ("vectors", False, 0.0): ["dense.bias", "norm.weight"],
        ("ep_size_1", True, 0.1): [f"{experts}.{i}.weight" for i in range(4)],
        ("ep_size_1", True, 0.0): [f"{experts}.{i}.bias" for i in range(4)],
    }


def groups_in_deepspeed(config: Any) -> list[tuple[Any, ...]]:
    trainer = make_trainer(config)
    trainer.step()
    inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    return [(g["name"], g["moe"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in inner.param_groups]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_neither_merges_nor_cuts_the_groups(zero_stage: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2, zero_stage=zero_stage)
    names = [found[:3] for found in run_ranks(2, groups_in_deepspeed, config)[0]]
    assert names == [("matrices", False, 0.1), ("vectors", False, 0.0), ("ep_size_2", True, 0.1)]


def test_fp32_routers_of_a_bf16_model_are_the_last_group() -> None:
    model = Mixed().bfloat16()
    model.sparse.router.float()
    assert [group["params"][0].dtype for group in parameter_groups(model, 0.1)] == [torch.bfloat16] * 4 + [
        torch.float32
    ]
    assert parameter_groups(model, 0.1)[-1]["params"] == [model.sparse.router.weight]


def router_in_bf16(config: Any) -> list[torch.Tensor]:
    """The router's weight as it was drawn, after DeepSpeed has taken the model, and after three steps."""
    drawn = build_model(config).blocks[1].ffn.router.weight.detach().clone()
    trainer = make_trainer(config)
    router = trainer.model.blocks[1].ffn.router.weight
    assert all(parameter.dtype == torch.bfloat16 for parameter in trainer.model.parameters() if parameter is not router)
    taken = router.detach().clone()
    for _ in range(3):
        trainer.step()
    return [drawn, taken, router.detach().clone()]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_routers_stay_in_fp32_under_bf16_and_train(zero_stage: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, ranks=2, expert=2, zero_stage=zero_stage, train={"precision": "bf16"})
    first, second = run_ranks(2, router_in_bf16, config)
    drawn, taken, trained = first
    assert taken.dtype == trained.dtype == torch.float32
    assert torch.equal(taken, drawn)
    assert (trained - drawn).abs().median() > 1e-3
    assert not torch.equal(trained, trained.bfloat16().float()), "more than bf16 can hold"
    assert torch.equal(trained, second[2])


def losses_of(config: Any) -> tuple[list[float], list[float], torch.dtype]:
    trainer = make_trainer(config)
    losses, norms = [], []
    for _ in range(12):
        norms.append(float(trainer.step()))
        losses.append(trainer.meter.read(layer_detail=False)["train/loss"])
    return losses, norms, next(trainer.model.parameters()).dtype


def test_bf16_is_the_same_at_every_stage_and_follows_fp32(tmp_path: Path) -> None:
    exact, exact_norms, _ = run_ranks(2, losses_of, small_config(tmp_path, ranks=2, expert=2))[0]
    low = {}
    for stage in (0, 1, 2):
        config = small_config(tmp_path, ranks=2, expert=2, zero_stage=stage, train={"precision": "bf16"})
        losses, norms, dtype = run_ranks(2, losses_of, config)[0]
        assert dtype == torch.bfloat16
        assert losses == pytest.approx(exact, rel=0.02)
        assert norms == pytest.approx(exact_norms, rel=0.1)
        low[stage] = losses
    assert low[0] == pytest.approx(low[1], rel=2e-3)
    assert low[2] == pytest.approx(low[1], rel=2e-3)


class Small(nn.Module):
    """A user's own module."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.sparse = moe_layer(
            16, num_experts=4, ep_size=ep_size, k=2, expert_ffn_size=16, seed=3, capacity_factor=None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sparse(self.inner(x))[0]


def prepare_how_often(config: Config) -> list[int]:
    """Calls of `prepare`: for `prepare_data`, and for a trainer that is given what it returns."""
    calls: list[int] = []
    module = import_module("dsmoe.train.initialize")
    whole = module.prepare

    def counted(*arguments: Any, **options: Any) -> list[PreparedSource]:
        calls.append(1)
        return whole(*arguments, **options)

    module.prepare = counted
    sources = prepare_data(config)
    first = len(calls)
    plan, folder = Plan.from_config(config), Path(config.runs_dir) / "checkpoints"
    trainer = assemble(plan, Groups(plan.topology), this_rank(), folder, sources)
    assert trainer.data.sources == sources
    return [first, len(calls) - first]


def test_data_are_prepared_once(tmp_path: Path) -> None:
    """On the first rank for all, on the first of each host for that host, and on every rank to open what is there."""
    config = small_config(tmp_path, ranks=2)
    assert run_ranks(2, prepare_how_often, config) == [[3, 0], [1, 0]]


def clipped_through_initialize(config: Config, elements: int) -> tuple[float, dict[str, torch.Tensor]]:
    clipping.ELEMENTS_PER_PIECE = elements
    groups = Groups(Topology.from_config(config))
    torch.manual_seed(0)
    model = Small(groups.topology.expert)
    engine, *_ = initialize(model=model, config=config, groups=groups)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(8):
        loss = engine(torch.randn(6, 16, generator=generator) * 3).square().sum() * 1e5
        engine.backward(loss)
        engine.step()
    return float(engine.get_global_grad_norm()), {n: p.detach().clone() for n, p in model.named_parameters()}


def test_initialize_clips_alike_at_every_stage(tmp_path: Path) -> None:
    """Four accumulation steps, so two optimizer steps with very different gradients, all of them clipped.

    Norms are taken of whole gradients, or in pieces of less than one weight.
    """
    results = [
        run_ranks(2, clipped_through_initialize, small_config(tmp_path, ranks=2, expert=2, zero_stage=stage), elements)
        for stage, elements in ((0, 2**18), (0, 50), (1, 2**18), (1, 50), (2, 50))
    ]
    for other in results[1:]:
        for (norm, weights), (other_norm, other_weights) in zip(results[0], other, strict=True):
            assert norm > 0.5, "nothing would be clipped"
            assert norm == pytest.approx(other_norm, rel=1e-5)
            for name, weight in weights.items():
                torch.testing.assert_close(weight, other_weights[name], rtol=1e-4, atol=1e-6)


def clipped_norm(tensor: int, max_norm: float) -> tuple[float, list[torch.Tensor]]:
    """Two experts, or two slices of one, of gradient (3, 0) and (0, 4 r) on rank r; 12 in dense ones, split or not."""
    groups = Groups(Topology(nodes=1, devices_per_node=2, tensor=tensor, expert=2 // tensor, expert_tensor=tensor))
    whole, split, expert = (nn.Parameter(torch.zeros(n)) for n in (1, 1, 2))
    whole.grad, split.grad = (torch.tensor([value]) for value in ((12.0, 0.0) if tensor == 1 else (4.0, 8.0)))
    expert.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]][dist.get_rank()])
    named = [
        {"params": [whole], "moe": False, "split": False},
        {"params": [split], "moe": False, "split": tensor > 1},
        {"params": [expert], "moe": True, "split": True, "name": groups.expert_group_name},
    ]
    norm = float(clip_gradients(torch.optim.AdamW(named), groups, max_norm))
    return norm, [whole.grad, split.grad, expert.grad]


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_norm_counts_every_part_once(tensor: int) -> None:
    """12^2 + 3^2 + 4^2 = 13^2, and so is 4^2 + 2 * 8^2 + 3^2 + 4^2."""
    dense = [12.0, 0.0] if tensor == 1 else [4.0, 8.0]
    for max_norm, scale in ((6.5, 0.5), (0.0, 1.0)):
        for norm, (whole, split, _) in run_ranks(2, clipped_norm, tensor, max_norm):
            assert norm == pytest.approx(13.0)
            assert [float(whole), float(split)] == pytest.approx([scale * value for value in dense])


def made_for_one_rank(config: Config) -> str:
    with pytest.raises(UserError) as error:
        initialize(model=Small(1), config=config, groups=Groups(Topology.from_config(config)))
    return str(error.value)


def test_a_layer_that_does_not_know_of_its_tensor_ranks_is_refused(tmp_path: Path) -> None:
    """Its router's gradient would silently be that of half of the tokens."""
    for message in run_ranks(2, made_for_one_rank, small_config(tmp_path, ranks=2, parallel={"tensor": 2})):
        assert "tensor_group=groups.tensor_group()" in message


def test_a_wrapper_that_a_checkpoint_would_miss_is_refused() -> None:
    class Wrapper:
        pass

    engine = type("Engine", (), {"optimizer": Wrapper()})()
    with pytest.raises(UserError, match="Wrapper, whose state dsmoe cannot save"):
        fragments(engine)
