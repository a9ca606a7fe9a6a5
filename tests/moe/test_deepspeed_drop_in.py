"""A script written for `deepspeed.moe.layer.MoE` runs the same when only its import changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import has_moe_layers, is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn

import dsmoe
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.layer_options import moe_layer

D, E = 16, 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))


def both_layers(**arguments: Any) -> tuple[DeepSpeedMoE, dsmoe.MoE]:
    """DeepSpeed's layer, with experts that differ and a router that decides clearly, and ours with its weights."""
    torch.manual_seed(0)
    theirs = DeepSpeedMoE(D, mlp(), E, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        theirs.deepspeed_moe.gate.wg.weight.normal_()
    ours = moe_layer(D, mlp(), E, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


NO_DROP = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
AGREE = {
    "k=1": {"k": 1, **NO_DROP},
    "k=2": {"k": 2, **NO_DROP},
    "k=3": {"k": 3, **NO_DROP},
    "k=1, all fit": {"k": 1, "capacity_factor": float(E)},
    "k=2, all fit": {"k": 2, "capacity_factor": E / 2, "top2_2nd_expert_sampling": False},
    "k=3, all fit": {"k": 3, "capacity_factor": E / 3 + 0.01},
    "residual": {"k": 1, "use_residual": True, **NO_DROP},
}


class TestSameWeights:
    """Where the two have one meaning they give one result."""

    @pytest.mark.parametrize("name", AGREE)
    def test_give_the_same_output_gradients_and_counts(self, name: str) -> None:
        layers = both_layers(**AGREE[name])
        x = torch.randn(2, 24, D)
        cotangent = torch.randn(2, 24, D)
        results = []
        for layer in layers:
            x = x.detach().clone().requires_grad_()
            output, loss, counts = layer(x)
            objective = (output * cotangent).sum()
            if AGREE[name]["k"] != 2:  # there DeepSpeed's loss counts the first choice only
                objective = objective + 3.0 * loss
            objective.backward()
            results.append({"output": output, "counts": counts, "x": x.grad, **gradients(layer)})
        theirs, ours = results
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{key} {text}")  # noqa: B023
        assert ours["counts"].dtype == theirs["counts"].dtype

    @pytest.mark.parametrize("k", [1, 3])
    def test_give_the_same_loss(self, k: int) -> None:
        theirs, ours = both_layers(k=k, **NO_DROP)
        x = torch.randn(48, D)
        torch.testing.assert_close(ours(x)[1], theirs(x)[1])

    def test_mask_the_same_tokens(self) -> None:
        theirs, ours = both_layers(k=1, **NO_DROP)
        x, used = torch.randn(48, D), (torch.arange(48) % 3 != 0).long()
        expected, _, expected_counts = theirs(x, used)
        output, _, counts = ours(x, used)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert counts.tolist() == expected_counts.tolist()

    def test_drop_the_same_where_every_expert_is_chosen(self) -> None:
        """With k = E the normalised weights are the scores, so both drop the same, and renormalise on request."""
        theirs, ours = both_layers(k=E, capacity_factor=0.5, min_capacity=1)
        ours.limit.options = ours.limit.options.model_copy(update={"renormalize_dropped": True})
        x = torch.randn(48, D)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)
        assert not ours(x)[0].equal(both_layers(k=E, **NO_DROP)[1](x)[0]), "nothing was dropped"


class TestNames:
    @pytest.mark.parametrize("use_residual", [False, True])
    def test_every_parameter_has_deepspeeds_name(self, use_residual: bool) -> None:
        theirs, ours = both_layers(use_residual=use_residual)
        assert [*ours.state_dict()] == [*theirs.state_dict()]
        for name, parameter in theirs.named_parameters():
            mine = ours.get_parameter(name)
            assert is_moe_param(mine) == is_moe_param(parameter), name
            assert getattr(mine, "group_name", None) == getattr(parameter, "group_name", None), name

    def test_what_others_read_is_there(self) -> None:
        theirs, ours = both_layers(k=3)
        for layer in (theirs, ours):
            _, loss, counts = layer(torch.randn(12, D))
            inner = layer.deepspeed_moe
            assert inner.l_aux is loss
            assert inner.exp_counts is counts
            assert len(inner.experts.deepspeed_experts) == inner.num_local_experts == inner.experts.num_local_experts
            assert inner.ep_group_name == layer.expert_group_name == "ep_size_1"
            assert (inner.ep_size, layer.ep_size, layer.num_experts, layer.num_local_experts) == (1, 1, E, E)
            assert inner.gate.wg.weight.shape == (E, D)
            assert inner.gate.k == 3
            assert layer.use_residual is layer.enable_expert_tensor_parallelism is False
            assert has_moe_layers(nn.Sequential(layer)) == (True, E)

    def test_a_layer_can_be_copied_after_a_pass(self) -> None:
        _, ours = both_layers()
        x = torch.randn(12, D)
        expected, _, _ = ours(x)
        assert torch.equal(copy.deepcopy(ours)(x)[0], expected)

    def test_stacked_experts_are_saved_one_by_one(self) -> None:
        first, other = (moe_layer(D, num_experts=E, expert_ffn_size=8, seed=seed) for seed in (1, 2))
        saved = first.state_dict()
        prefix = "deepspeed_moe.experts.deepspeed_experts"
        assert [*saved] == [
            "deepspeed_moe.gate.wg.weight",
            *(f"{prefix}.{i}.{name}" for name in ("gate_up", "down") for i in range(E)),
        ]
        other.load_state_dict(saved)
        assert torch.equal(other.experts.gate_up, first.experts.gate_up)
        assert torch.equal(other.experts.down, first.experts.down)
        del saved[f"{prefix}.2.down"]
        with pytest.raises(RuntimeError, match=r"Missing key.*experts\.down"):
            other.load_state_dict(saved)


class Net(nn.Module):
    """What a user of DeepSpeed writes: the layer's loss is added by hand."""

    def __init__(self, layer_class: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        # For k=2 DeepSpeed's loss counts the first choice only, and could not be compared.
        self.aux_weight = 0.0 if arguments.get("k") == 2 else 0.1
        self.first = nn.Linear(D, D)
        expert = None if "expert_ffn_size" in arguments else mlp()
        self.moe = layer_class(D, expert, E, **arguments)
        self.last = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        output, aux_loss, _ = self.moe(self.first(x))
        return nn.functional.mse_loss(self.last(output), target) + self.aux_weight * aux_loss


def start(model: nn.Module, zero_stage: int, mpu: Any = None, **more: Any) -> deepspeed.DeepSpeedEngine:
    group = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(group), lr=0.01)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": zero_stage}, **more}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range) -> list[float]:
    """This rank's losses in the steps of these numbers, and one in evaluation."""
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x, target = torch.randn(2, 2, 12, D, generator=generator).to(dtype)
        engine.train()
        loss = engine(x, target)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        losses.append(engine(x, target).item())
    return losses


def spread(net: Net) -> None:
    """A router that decides clearly, and experts that differ, as DeepSpeed's own do not at first."""
    with torch.no_grad():
        net.moe.deepspeed_moe.gate.wg.weight.normal_()
        for parameter in net.moe.deepspeed_moe.experts.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def whole_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


LAYERS = [
    {"k": 1, "use_residual": True, **NO_DROP},
    {"k": 2, **NO_DROP},
    {"k": 3, "capacity_factor": 4.0, "eval_capacity_factor": 4.0},
]


def train_both(zero_stage: int) -> list[tuple[str, list[float], list[float], float]]:
    """Every expert degree, each with another of `LAYERS`: in three stages they all meet."""
    results = []
    for index, ep_size in enumerate((1, 2, 4)):
        arguments = LAYERS[(index + zero_stage) % 3]
        torch.manual_seed(0)
        theirs = Net(DeepSpeedMoE, ep_size=ep_size, **arguments)
        ours = Net(dsmoe.MoE, ep_size=ep_size, **arguments)
        spread(theirs)
        ours.load_state_dict(theirs.state_dict())
        engines = [start(net, zero_stage) for net in (theirs, ours)]
        losses = [train(engine, range(3)) for engine in engines]
        expected, actual = (whole_state(engine) for engine in engines)
        apart = max((actual[name] - weight).abs().max().item() for name, weight in expected.items())
        results.append((f"ep_size {ep_size} {arguments}", *losses, apart))
    return results


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_training_on_four_ranks_is_training_with_deepspeeds_layer(zero_stage: int) -> None:
    for rank in run_ranks(4, train_both, zero_stage):
        for name, theirs, ours, apart in rank:
            assert ours == pytest.approx(theirs, rel=1e-5), name
            assert apart < 1e-4, name


def save_and_load(folder: Path, zero_stage: int, written_by: type[nn.Module], arguments: dict[str, Any]) -> list[Any]:
    """The losses after a checkpoint, and those of an engine of other weights that has loaded it."""
    torch.manual_seed(0)
    saved = Net(written_by, ep_size=2, **arguments)
    spread(saved)
    if "bias_update_rate" in arguments:
        saved.moe.balance.bias.copy_(torch.arange(E) / 10)
        saved.moe.limit.controller.factor = 1.5
    engine = start(saved, zero_stage)
    train(engine, range(2))
    engine.save_checkpoint(str(folder), client_state={"note": "theirs"})
    expected = [whole_state(engine), train(engine, range(2, 4))]
    torch.manual_seed(1)
    engine = start(Net(moe_layer, ep_size=2, **arguments), zero_stage)
    path, state = engine.load_checkpoint(str(folder))
    assert path is not None
    assert state["note"] == "theirs"
    return [expected, [whole_state(engine), train(engine, range(2, 4))]]


COPIES = {"k": 2, "use_residual": True, "bias_update_rate": 0.1, "target_drop_percent": 1.0}


@pytest.mark.parametrize(
    ("zero_stage", "written_by", "arguments"),
    [
        *((stage, moe_layer, COPIES) for stage in (0, 1, 2)),
        (1, moe_layer, {"k": 2, "expert_ffn_size": 8}),
        (1, DeepSpeedMoE, {"k": 2, "use_residual": True, **NO_DROP}),
    ],
    ids=["copies-0", "copies-1", "copies-2", "stacked", "DeepSpeed's"],
)
def test_deepspeeds_checkpoints_restore_everything(
    zero_stage: int, written_by: type[nn.Module], arguments: dict[str, Any], tmp_path: Path
) -> None:
    for expected, loaded in run_ranks(2, save_and_load, tmp_path, zero_stage, written_by, arguments):
        assert loaded[0].keys() == expected[0].keys()
        for name, value in expected[0].items():
            assert torch.equal(loaded[0][name], value), name
        assert loaded[1] == pytest.approx(expected[1], rel=1e-6)


class DegreeOne:
    """The least that `deepspeed.initialize` asks of a model-parallel unit, without model parallelism."""

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        self.everyone = dist.group.WORLD

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> Any:
        return self.alone

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_group(self) -> Any:
        return self.everyone


def train_with(mpu: bool, config: dict[str, Any]) -> list[float]:
    torch.manual_seed(0)
    net = Net(dsmoe.MoE, ep_size=2, k=2)
    spread(net)
    return train(start(net, 1, DegreeOne() if mpu else None, **config), range(2))


def test_an_mpu_of_degree_one_changes_nothing() -> None:
    for plain, with_mpu in zip(run_ranks(2, train_with, False, {}), run_ranks(2, train_with, True, {}), strict=True):
        assert with_mpu == plain


def test_deepspeeds_timers_and_profiler_run() -> None:
    profiler = {"enabled": True, "profile_step": 2}
    measured = {"wall_clock_breakdown": True, "steps_per_print": 1, "flops_profiler": profiler}
    assert run_ranks(2, train_with, False, measured) == run_ranks(2, train_with, False, {})
