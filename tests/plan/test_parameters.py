"""Parameter counts against published models and against counting by hand."""

from __future__ import annotations

import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.sections.moe import ACTIVATION_SHAPES, ActivationShape
from dsmoe.plan import Topology, count_parameters, head_dim, is_moe_layer, num_kv_heads, num_moe_layers
from tests.helpers.plan_configs import make_config

MIXTRAL = make_config(
    model={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_size": None,
        "max_sequence_length": 32_768,
    },
    moe={"num_experts": 8, "top_k": 2, "expert_ffn_size": 14_336},
)
QWEN3 = make_config(
    model={
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "ffn_size": None,
        "max_sequence_length": 40_960,
        "qk_norm": True,
    },
    moe={"num_experts": 128, "top_k": 8, "expert_ffn_size": 768},
)


def test_mixtral_8x7b() -> None:
    """mistralai/Mixtral-8x7B-v0.1: the checkpoint's 46,702,792,704 parameters; 12.9 B active (arXiv:2401.04088)."""
    counts = count_parameters(MIXTRAL)
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248
    assert counts.router == 32 * 8 * 4096
    assert counts.experts == 32 * 8 * 3 * 4096 * 14_336


def test_qwen3_30b_a3b() -> None:
    """Qwen/Qwen3-30B-A3B: 30.5 B in total, 3.3 B activated (model card), summed here by hand over one layer."""
    attention = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048
    norms = 2 * 2048 + 2 * 128
    router, expert = 128 * 2048, 3 * 2048 * 768
    outside = 2 * 151_936 * 2048 + 2048
    counts = count_parameters(QWEN3)
    assert counts.total == outside + 48 * (attention + norms + router + 128 * expert) == 30_532_122_624
    assert counts.active == outside + 48 * (attention + norms + router + 8 * expert) == 3_353_032_704


def test_mixed_layers_by_hand() -> None:
    """Layers 0 and 1 and 3 dense, 2 and 4 MoE: every part counted with different numbers."""
    config = make_config(
        model={
            "vocab_size": 11,
            "hidden_size": 6,
            "num_layers": 5,
            "num_heads": 3,
            "num_kv_heads": 1,
            "head_dim": 4,
            "ffn_size": 7,
            "dense_layers": 1,
            "moe_every": 2,
            "qk_norm": True,
            "tie_embeddings": True,
        },
        moe={"num_experts": 5, "top_k": 3, "expert_ffn_size": 2},
    )
    assert [is_moe_layer(config, index) for index in range(5)] == [False, False, True, False, True]
    assert num_moe_layers(config) == 2
    counts = count_parameters(config)
    assert counts.embedding == 11 * 6
    assert counts.output_head == 0
    assert counts.attention == 5 * (6 * 12 + 6 * 4 + 6 * 4 + 12 * 6)
    assert counts.dense_ffn == 3 * 3 * 6 * 7
    assert counts.router == 2 * 5 * 6
    assert counts.experts == 2 * 5 * 3 * 6 * 2
    assert counts.active_experts == 2 * 3 * 3 * 6 * 2
    assert counts.norms == 5 * (6 + 6 + 4 + 4) + 6
    assert counts.total == 66 + 960 + 378 + 60 + 360 + 106
    assert counts.active == counts.total - 360 + 216


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 3), ("relu2", 2)])
def test_what_every_token_passes_by_hand(activation: str, matrices: int) -> None:
    """Hidden 8, three layers; a shared expert of width 5, or a residual MLP of an expert's width 8."""
    moe = {"num_experts": 4, "expert_ffn_size": 8, "activation": activation}
    model = {"ffn_size": None}
    plain = count_parameters(make_config(model=model, moe=moe))
    shared = count_parameters(make_config(model=model, moe={**moe, "shared_expert_ffn_size": 5}))
    residual = count_parameters(make_config(model=model, moe={**moe, "residual": True}))
    assert (plain.shared_experts, plain.residual_mix) == (0, 0)
    assert (shared.shared_experts, shared.residual_mix) == (3 * matrices * 8 * 5, 0)
    assert (residual.shared_experts, residual.residual_mix) == (3 * matrices * 8 * 8, 3 * (2 * 8 + 2))
    for counts in (shared, residual):
        more = counts.shared_experts + counts.residual_mix
        assert (counts.total - plain.total, counts.active - plain.active) == (more, more)
        held = counts.per_device(Topology(nodes=1, devices_per_node=4, tensor=2, expert=2))
        without = plain.per_device(Topology(nodes=1, devices_per_node=4, tensor=2, expert=2))
        assert held.shared - without.shared == counts.shared_experts // 2 + counts.residual_mix
        assert held.experts == without.experts


def test_dense_model_is_all_active() -> None:
    counts = count_parameters(make_config(moe=None))
    assert counts.total == counts.active == 2 * 100 * 8 + 3 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
    assert counts.router == counts.experts == counts.active_experts == 0


@pytest.mark.parametrize(
    ("dense_layers", "moe_every", "moe_layers"),
    [(0, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [2, 3, 4, 5]), (0, 2, [1, 3, 5]), (1, 2, [2, 4]), (6, 1, []), (0, 7, [])],
)
def test_which_layers_are_moe(dense_layers: int, moe_every: int, moe_layers: list[int]) -> None:
    config = make_config(
        model={"num_layers": 6, "dense_layers": dense_layers, "moe_every": moe_every},
        moe={"num_experts": 4, "expert_ffn_size": 8},
    )
    assert [index for index in range(6) if is_moe_layer(config, index)] == moe_layers
    assert not any(is_moe_layer(config.model_copy(update={"moe": None}), index) for index in range(6))


def test_what_is_gated_is_said_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(moe={"num_experts": 4, "expert_ffn_size": 8, "shared_expert_ffn_size": 24})
    assert config.moe is not None
    moe_layers, D = num_moe_layers(config), config.model.hidden_size
    other = config.model_copy(update={"moe": config.moe.model_copy(update={"activation": "made up"})})
    with pytest.raises(UserError, match=r"moe\.activation must be one of swiglu, .*, not 'made up'"):
        count_parameters(other)
    for gated, matrices in ((True, 3), (False, 2)):
        monkeypatch.setitem(ACTIVATION_SHAPES, "made up", ActivationShape(gated))
        counts = count_parameters(other)
        assert counts.experts == moe_layers * 4 * matrices * D * 8
        assert counts.shared_experts == moe_layers * matrices * D * 24


def test_shapes_that_are_left_out_follow_from_others() -> None:
    model = make_config(model={"hidden_size": 8, "num_heads": 2}).model
    assert (head_dim(model), num_kv_heads(model)) == (4, 2)


def test_one_device_holds_its_experts_and_its_slice_of_the_matrices() -> None:
    counts = count_parameters(MIXTRAL)
    experts_only = counts.per_device(Topology(nodes=8, devices_per_node=8, expert=8))
    assert experts_only.experts == counts.experts // 8
    assert experts_only.shared == counts.total - counts.experts
    cut = counts.per_device(Topology(nodes=8, devices_per_node=8, tensor=4, expert=4, expert_tensor=2))
    whole = counts.router + counts.norms
    assert cut.experts == counts.experts // 8
    assert cut.shared == (counts.total - counts.experts - whole) // 4 + whole
    assert cut.total == cut.shared + cut.experts


def test_few_key_value_heads_are_whole_on_every_tensor_rank() -> None:
    counts = count_parameters(MIXTRAL)
    assert counts.num_kv_heads == 8
    whole = counts.router + counts.norms + counts.key_value
    held = counts.per_device(Topology(nodes=8, devices_per_node=8, tensor=16))
    assert held.shared == (counts.total - counts.experts - whole) // 16 + whole
