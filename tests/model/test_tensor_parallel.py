"""The model over a tensor group is the model of one rank: losses, logits and every gradient, sliced or not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsmoe.config.schema import Config
from dsmoe.model import Transformer, build_model
from dsmoe.moe.experts import StackedExperts
from dsmoe.nn import loss
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.plan_configs import make_config

MODEL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 8,
    "ffn_size": 24,
    "dense_layers": 1,
    "max_sequence_length": 16,
    "init_std": 0.2,
}
MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "balance": {"aux_loss": 0.5, "z_loss": 0.1}}


@dataclass(frozen=True)
class Case:
    """`moe` updates that of the config; sequence parallelism is tried with and without."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] | None = field(default_factory=dict)
    expert: int = 1
    expert_tensor: int = 1
    train: dict[str, Any] = field(default_factory=dict)

    def config(self, tensor: int, sequence: bool) -> Config:
        parallel = {"tensor": tensor, "expert": self.expert, "expert_tensor": self.expert_tensor, "sequence": sequence}
        return make_config(
            model={**MODEL, **self.model},
            moe=None if self.moe is None else {**MOE, **self.moe},
            parallel=parallel,
            cluster={"devices_per_node": tensor},
            train=self.train,
        )


def cases(ranks: int) -> list[Case]:
    def scope(name: str) -> dict[str, Any]:
        return {"balance": {"aux_loss": 0.5, "scope": name}}

    return [
        Case("dense", moe=None, model={"dense_layers": 0}),
        Case("experts on every rank", expert=1),
        Case("folded experts", expert=ranks),
        Case("sliced experts", expert_tensor=ranks),
        Case("sliced folded experts", expert=ranks // 2, expert_tensor=2),
        Case("sliced experts, GELU", expert_tensor=2, moe={"activation": "gelu"}),
        Case("sliced experts, padded", expert_tensor=2, moe={"capacity": {"factor": 4.0, "minimum": 16}}),
        Case("one key/value head", model={"num_kv_heads": 1, "qk_norm": True}, expert=ranks),
        Case("two key/value heads", model={"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True}),
        Case("shared expert", moe={"shared_expert_ffn_size": 24}, expert=ranks),
        Case("shared expert, GELU", moe={"shared_expert_ffn_size": 24, "activation": "gelu"}),
        Case("residual", moe={"residual": True}, expert=ranks),
        Case("per sequence", moe=scope("sequence"), expert=ranks),
        Case("global", moe=scope("global")),
        Case("recomputed", expert=ranks, train={"recompute": "full"}),
    ]


def gradients(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = model(tokens)
    losses.mean().backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def part_of(whole: torch.Tensor, name: str, model: nn.Module, groups: Groups) -> torch.Tensor:
    """What this rank holds of a tensor like the whole model's parameter `name`."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, StackedExperts):
        shard = module.shards(groups.coordinate("expert_tensor"))[name.endswith("down")]
        first = groups.coordinate("expert") * module.num_local_experts
        return torch.stack([shard.slice_of(expert) for expert in whole[first : first + module.num_local_experts]])
    shard = getattr(module, "shard", None)
    return whole if shard is None else shard.slice_of(whole)


def check_case(case: Case, sequence: bool) -> None:
    ranks = dist.get_world_size()
    config = case.config(ranks, sequence)
    groups = Groups(Topology.from_config(config))
    whole, split = build_model(config), build_model(config, groups)
    torch.manual_seed(1)
    tokens = torch.randint(MODEL["vocab_size"], (2, 9))

    def same(what: str, actual: torch.Tensor, wanted: torch.Tensor) -> None:
        name = f"{case.name}{', sequence' if sequence else ''}: {what}"
        torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=2e-6, msg=lambda m: f"{name}: {m}")

    weights = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        assert torch.equal(parameter, part_of(weights[name], name, split, groups)), f"{case.name}: {name}"
    same("logits", split.eval().logits(tokens[:, :-1]), whole.eval().logits(tokens[:, :-1]))
    split.train()
    whole.train()
    expected, wanted = gradients(whole, tokens)
    losses, found = gradients(split, tokens)
    same("losses", losses, expected)
    for name, gradient in found.items():
        if hasattr(dict(split.named_parameters())[name], "group_name"):
            dist.all_reduce(gradient, group=groups.handle("expert_data"))
        same(f"{name}.grad", gradient, part_of(wanted[name], name, split, groups))
    for (_, mine), (_, all_) in zip(split.moe_layers(), whole.moe_layers(), strict=True):
        dist.all_reduce(mine.statistics.sums)
        sums = mine.statistics.sums
        same("assigned", sums[:4], all_.statistics.sums[:4])
        same("tokens", sums[-3], all_.statistics.sums[-3])
        same("balancing losses", sums[-6:-4] / sums[-2], all_.statistics.sums[-6:-4] / all_.statistics.sums[-2])


def check_all() -> None:
    loss.LOGITS_PER_CHUNK = 5 * MODEL["vocab_size"] // dist.get_world_size()
    for case, sequence in itertools.product(cases(dist.get_world_size()), (False, True)):
        check_case(case, sequence)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_split_model_is_the_whole_one(ranks: int) -> None:
    run_ranks(ranks, check_all)
