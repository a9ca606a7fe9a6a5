"""The sizes follow from the config, and everybody meets everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmoe.config import Config, load_config
from dsmoe.plan import Topology
from dsmoe.plan.plan import Plan
from dsmoe.preflight.workload import MAX_ROUNDS, Product, group_ranks, messages, products, rounds
from tests.helpers.small_runs import small_config

CONFIGS = Path(__file__).parents[2] / "configs"


def small(folder: Path, **sections: object) -> Config:
    return small_config(folder, **sections)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(1, MAX_ROUNDS + 1))
def test_each_meets_each_other_once(number: int) -> None:
    met = [pair for pairs in rounds(number) for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(number) for b in range(a + 1, number)]


@pytest.mark.parametrize("number", [2, 3, 8, 17, 18, 33, 256, 1000])
def test_nobody_is_in_two_pairs_of_a_round(number: int) -> None:
    turns = rounds(number)
    assert len(turns) <= MAX_ROUNDS
    for pairs in turns:
        places = [place for pair in pairs for place in pair]
        assert len(set(places)) == len(places) >= number - 1
    assert len(set(turns)) == len(turns)


def test_products_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    config = small(tmp_path, ranks=4, expert=2, parallel={"tensor": 2}, train={"batch_tokens": 8 * 32})
    # 32 tokens; the output head's 264 columns over two tensor ranks; 16 tokens to 2 of 4 experts, of which 2 are here.
    assert products(Plan.from_config(config)) == [
        Product("output head", 32, 32, 132),
        Product("experts", 32, 32, 2 * 24, count=2),
    ]
    mixtral = load_config(CONFIGS / "mixtral_8x7b.yaml")
    dense, experts = products(Plan.from_config(mixtral))
    assert (dense.name, dense.inner) == ("query", 4096)
    assert experts.inner == 4096
    assert experts.width * mixtral.parallel.expert_tensor == 2 * 14336


def test_a_product_is_cut_to_fit_memory_and_time() -> None:
    product = Product("experts", rows=8192, inner=1024, width=4096, count=8)
    assert product.within(10**9, 1e15) == product
    for numbers, flops in ((20_000_000, 1e15), (10_000_000, 1e15), (10**9, 1e9), (1, 1)):
        cut = product.within(numbers, flops)
        assert cut.rows % cut.count == 0
        assert cut.rows >= cut.count >= 1
        assert cut.numbers <= numbers or (cut.count == 1 and cut.rows == 1)
        assert cut.flops <= flops or cut.rows == cut.count


def test_messages_of_each_axis(tmp_path: Path) -> None:
    config = small(tmp_path, ranks=4, expert=2, parallel={"tensor": 2}, train={"batch_tokens": 8 * 32})
    found = {message.name: message for message in messages(Plan.from_config(config))}
    assert list(found) == ["gradients", "tensor", "expert gradients", "dispatch"]
    assert found["tensor"].bytes == 32 * 32 * 4
    assert found["dispatch"].bytes == 16 * 2 * 32 * 4
    assert found["expert gradients"].bytes == 2 * 3 * 32 * 24 * 4
    assert found["dispatch"].bus_factor == 0.5
    assert found["gradients"].bus_factor == 1.0
    assert group_ranks(Topology.from_config(config), found["dispatch"]) == ((0, 1), (2, 3))


def test_padded_exchanges_are_full_buffers(tmp_path: Path) -> None:
    config = small(tmp_path, ranks=2, expert=2, moe={"capacity": {"factor": 1.25, "minimum": 1}})
    (dispatch,) = (message for message in messages(Plan.from_config(config)) if message.name == "dispatch")
    assert dispatch.bytes == 4 * 20 * 32 * 4  # 4 experts, ceil(64 / 4 * 1.25) rows each


def test_a_hierarchical_exchange_has_two_messages(tmp_path: Path) -> None:
    layout = {"expert": 4, "all_to_all": "hierarchical"}
    config = small(tmp_path, cluster={"nodes": 2, "devices_per_node": 2}, parallel=layout)
    found = {message.name: message for message in messages(Plan.from_config(config))}
    assert found["dispatch across nodes"].size == found["dispatch inside nodes"].size == 2
    topology = Topology.from_config(config)
    assert group_ranks(topology, found["dispatch across nodes"]) == ((0, 2), (1, 3))
    assert group_ranks(topology, found["dispatch inside nodes"]) == ((0, 1), (2, 3))


def test_a_large_gradient_goes_in_buckets() -> None:
    config = load_config(CONFIGS / "mixtral_8x7b.yaml")
    assert max(message.bytes for message in messages(Plan.from_config(config))) <= 2 * 500_000_000
    config = load_config(CONFIGS / "mixtral_8x7b.yaml", ["deepspeed.zero_optimization={reduce_bucket_size: 1000}"])
    assert next(message.bytes for message in messages(Plan.from_config(config)) if message.name == "gradients") == 2000


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_work_to_do(path: Path) -> None:
    config = load_config(path)
    topology = Topology.from_config(config)
    assert all(product.flops > 0 for product in products(Plan.from_config(config)))
    for message in messages(Plan.from_config(config)):
        assert {len(group) for group in group_ranks(topology, message)} == {message.size}
