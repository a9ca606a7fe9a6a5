"""FLOPs per token, summed by hand."""

from __future__ import annotations

import pytest

from dsmoe.config.schema import Config
from dsmoe.plan import Flops, count_parameters
from dsmoe.plan import flops_per_token as flops_of
from tests.helpers.plan_configs import make_config


def flops_per_token(config: Config, sequence_length: int) -> Flops:
    return flops_of(config, count_parameters(config), sequence_length)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_mixed_layers_by_hand(tie_embeddings: bool) -> None:
    """Hidden 6, 3 heads of 4 over 1 key/value head; layers 0 and 2 dense, 1 and 3 MoE with 2 of 5 experts."""
    config = make_config(
        model={
            "vocab_size": 11,
            "hidden_size": 6,
            "num_layers": 4,
            "num_heads": 3,
            "num_kv_heads": 1,
            "head_dim": 4,
            "ffn_size": 7,
            "moe_every": 2,
            "tie_embeddings": tie_embeddings,
        },
        moe={"num_experts": 5, "top_k": 2, "expert_ffn_size": 9},
    )
    projections = 2 * 6 * 12 + 2 * 6 * 4 + 2 * 6 * 4 + 2 * 12 * 6  # q, k, v, o
    scores_and_values = 2 * 10 * 12 + 2 * 10 * 12
    dense = 3 * 2 * 6 * 7
    experts = 2 * 6 * 5 + 2 * (3 * 2 * 6 * 9)  # router, then two experts
    head = 2 * 6 * 11
    flops = flops_per_token(config, 10)
    assert flops.forward == 4 * (projections + scores_and_values) + 2 * dense + 2 * experts + head
    assert flops.training == 3 * flops.forward
    assert flops.causal_training == flops.training - 3 * 4 * scores_and_values // 2


def test_dense_model_is_six_times_its_matrices_plus_attention() -> None:
    config = make_config(moe=None)
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 16) + 100 * 8
    assert flops_per_token(config, 32).training == 6 * matrices + 12 * 3 * 8 * 32


def test_what_every_token_passes_costs_its_matrices() -> None:
    """Hidden 8, three MoE layers; the coefficients of a residual MoE are a product to two numbers."""
    moe = {"num_experts": 4, "expert_ffn_size": 8}
    plain, shared, residual = (
        flops_per_token(make_config(model={"ffn_size": None}, moe={**moe, **more}), 32).forward
        for more in ({}, {"shared_expert_ffn_size": 5}, {"residual": True})
    )
    assert shared - plain == 3 * 3 * 2 * 8 * 5
    assert residual - plain == 3 * (3 * 2 * 8 * 8 + 2 * 8 * 2)


def test_only_the_attention_grows_with_the_sequence() -> None:
    config = make_config(moe={"num_experts": 4, "expert_ffn_size": 8})
    per_position = 3 * 2 * 2 * 8  # layers x (scores, values) x multiply-add x width of all heads
    short, long = (flops_per_token(config, length).forward for length in (16, 48))
    assert long - short == 32 * per_position
