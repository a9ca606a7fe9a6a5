"""The same run on every layout: losses, gradient norms, held-out loss and weights of one rank are those of N.

In the ordinary run, the fewest layouts in which every pair of settings occurs; all of them with `-m layouts`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.schema import Config
from dsmoe.parity.layouts import parse_layout
from dsmoe.parity.training import TOLERANCES, Training, difference
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.small_runs import small_config, train

STEPS, GOLDEN_STEPS = 6, 10
MOST_RANKS = 8

Settings = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One choice of every setting; `copies` multiplies the fewest ranks that the degrees can do with."""

    tensor: int
    sequence: bool
    expert: int
    expert_tensor: int
    zero_stage: int
    all_to_all: str
    chunks: int
    copies: int

    @property
    def ranks(self) -> int:
        return max(self.tensor, self.expert * self.expert_tensor) * self.copies

    @property
    def nodes(self) -> int:
        return 2 if self.all_to_all == "hierarchical" else 1

    @property
    def can_be(self) -> bool:
        if self.sequence and self.tensor == 1:
            return False
        # Two levels are two only where one copy of the experts is on several nodes of several ranks.
        several = self.ranks >= 4 and self.expert * self.expert_tensor == self.ranks
        return self.ranks <= MOST_RANKS and (self.nodes == 1 or several)

    def __str__(self) -> str:
        return (
            f"tp={self.tensor},sp={str(self.sequence).lower()},ep={self.expert},etp={self.expert_tensor},"
            f"zero={self.zero_stage},a2a={self.all_to_all},chunks={self.chunks},nodes={self.nodes},"
            f"dp={self.ranks // self.tensor}"
        )

    def pairs(self) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(vars(self).items(), 2))


def all_layouts() -> list[Layout]:
    choices = ((1, 2, 4), (False, True), (1, 2, 4, 8), (1, 2), (0, 1, 2), ("flat", "hierarchical"), (1, 3), (1, 2))
    layouts = (Layout(*choice) for choice in itertools.product(*choices))
    return sorted((layout for layout in layouts if layout.can_be), key=lambda layout: layout.ranks)


def covering(layouts: list[Layout]) -> Iterator[Layout]:
    """Again and again the layout with the most pairs that have not been there; of equals the one of fewest ranks."""
    left = set().union(*(layout.pairs() for layout in layouts))
    while left:
        best = max(layouts, key=lambda layout: len(layout.pairs() & left))
        left -= best.pairs()
        yield best


LAYOUTS = list(covering(all_layouts()))
OTHERS = [layout for layout in all_layouts() if layout not in LAYOUTS]

WHOLE = {  # a model with everything that is cut, replicated or shared in its own way
    "model": {"qk_norm": True},
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "expert_ffn_size": 32,
        "shared_expert_ffn_size": 16,
        "balance": {"aux_loss": 0.02, "z_loss": 0.001},
    },
    "train": {"batch_tokens": 16 * 32, "micro_batch_size": 2},
    # Adam divides a gradient by its own size: the rounding of one near zero would be a whole step of the weight.
    "optimizer": {"eps": 1e-6},
}
BALANCED = {  # by what is brought up to date between the steps
    "num_experts": 4,
    "top_k": 2,
    "expert_ffn_size": 32,
    "router": {"score": "sigmoid", "scale": 1.5, "num_groups": 2, "top_k_groups": 1},
    "balance": {"aux_loss": 0.02, "scope": "global", "bias_update_rate": 0.01},
}
MOE = {
    "plain": {},
    "balanced": BALANCED,
    "residual": {"residual": True, "activation": "gelu", "expert_ffn_size": 32},
    # A capacity that nothing can exceed: the other two dispatches, the same numbers.
    "padded": {"capacity": {"factor": 2.0, "eval_factor": 2.0, "minimum": 64}},
    "with a capacity": {"capacity": {"factor": 2.0, "eval_factor": 2.0, "minimum": 64, "pad": False}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def config_of(folder: Path, layout: str, **sections: Settings) -> Config:
    """The small model on a layout, written as for `dsmoe parity`."""
    sections["optimizer"] = {**WHOLE["optimizer"], **sections.get("optimizer", {})}
    for key, value in parse_layout(layout).overrides.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return small_config(folder, **sections)


def train_on(folder: Path, layout: str, steps: int = STEPS, **sections: Settings) -> list[Training]:
    """What every rank of the layout has seen."""
    config = config_of(folder, layout, **{name: dict(section) for name, section in sections.items()})
    return run_ranks(config.cluster.nodes * config.cluster.devices_per_node, train, config, steps)


def assert_same(trainings: list[Training], reference: Training) -> None:
    off = difference(trainings, reference)
    assert not off.beyond(TOLERANCES["fp32"]), off


@pytest.fixture(scope="module")
def reference(folder: Path) -> Training:
    """The model with everything, on one rank."""
    return train_on(folder, "tp=1", **WHOLE)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_pair_of_settings_trains_the_same_model(layout: Layout, folder: Path, reference: Training) -> None:
    assert_same(train_on(folder, str(layout), **WHOLE), reference)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_every_layout_trains_the_same_model(layout: Layout, folder: Path, reference: Training) -> None:
    assert_same(train_on(folder, str(layout), **WHOLE), reference)


def test_the_layouts_cover_every_pair_and_few_would_do() -> None:
    pairs = set().union(*(layout.pairs() for layout in all_layouts()))
    assert set().union(*(layout.pairs() for layout in LAYOUTS)) == pairs
    assert len(LAYOUTS) < 25 < len(OTHERS)


@pytest.fixture(scope="module", params=MOE)
def routed(folder: Path, request: pytest.FixtureRequest) -> tuple[Settings, Training]:
    """A moe section, and the training with it on one rank."""
    moe = MOE[request.param]
    return moe, train_on(folder, "tp=1", moe=moe)[0]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("ep=2,zero=0", "selective"), ("tp=2,sp=true,ep=4,zero=2,dp=2", "full")],
)
def test_every_routing_is_the_same_on_every_layout(
    layout: str, recompute: str, folder: Path, routed: tuple[Settings, Training]
) -> None:
    moe, reference = routed
    assert_same(train_on(folder, layout, moe=moe, train={"recompute": recompute}), reference)


def test_a_bias_that_balances_has_moved(folder: Path) -> None:
    weights = train_on(folder, "tp=1", moe=BALANCED)[0].weights
    assert weights["blocks.1.ffn.balance.bias"].abs().max() > 0.01
    assert weights["blocks.1.ffn.balance.load_share"].sum() == pytest.approx(1.0)


def test_losses_are_those_of_the_golden_file(folder: Path) -> None:
    """The numbers of another day: a change that moves them is either a bug or belongs in its commit's message."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "small.json").read_text(encoding="utf-8"))
    training = run_ranks(1, train, small_config(folder), GOLDEN_STEPS)[0]
    assert {name: getattr(training, name) for name in golden} == {
        name: pytest.approx(value, rel=1e-4) for name, value in golden.items()
    }
    assert min(training.norms) > 0.5, "clipping was active: the other tests would not see a wrong clip"
    assert training.losses[-1] < 0.8 * training.losses[0], "training moved"


def test_offloaded_optimizer_trains_the_same_model(folder: Path, reference: Training) -> None:
    """Another way to the norm in DeepSpeed."""
    assert_same(train_on(folder, "tp=2,ep=4,zero=2", **{**WHOLE, "optimizer": {"offload": True}}), reference)


def test_bf16_norms_are_the_same_in_every_wrapper_and_near_those_of_one_rank(folder: Path) -> None:
    """Between layouts bf16 rounds other sums, by up to 2^-9 of each; between DeepSpeed's wrappers nothing differs."""
    short = {**WHOLE, "train": {"micro_batch_size": 2, "precision": "bf16", "batch_tokens": 16 * 32}}
    (one,) = train_on(folder, "tp=1", 3, **short)
    plain = train_on(folder, "tp=2,sp=true,ep=2,etp=2,zero=0", 3, **short)
    assert not difference(plain, one).beyond(TOLERANCES["bf16"])
    for zero_stage in (1, 2):
        layout = f"tp=2,sp=true,ep=2,etp=2,zero={zero_stage}"
        for training in train_on(folder, layout, 3, **short):
            assert training.norms == pytest.approx(plain[0].norms, rel=1e-5)
            assert training.losses == pytest.approx(plain[0].losses, rel=1e-5)
