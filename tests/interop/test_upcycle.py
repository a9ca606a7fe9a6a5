"""A dense model made MoE computes the same before noise, where theory says so, and is refused where it cannot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsmoe.cli import main
from dsmoe.config.dump import dump_config
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.interop import upcycle as upcycling
from dsmoe.interop.logits import compare, our_logits
from dsmoe.interop.tensors import Tensors
from dsmoe.interop.upcycle import cut_of, upcycle
from dsmoe.runtime.spawn import run_ranks
from tests.helpers import made_up_entries
from tests.helpers.checkpoint_runs import tensors_of
from tests.helpers.hugging_face_models import (
    LLAMA,
    QWEN3,
    chunked,
    load_sections,
    make_config,
    save,
    save_theirs,
    train_on,
)

BIAS_KEY = "buffer/blocks.1.ffn.balance.bias"
INNER = 48
"""The width of the dense model's feed-forward."""
EXACT: dict[str, dict[str, Any]] = {
    "copies": {"num_experts": 4, "top_k": 2, "expert_ffn_size": INNER},
    "copies, sigmoid and a factor": {
        "num_experts": 4,
        "top_k": 3,
        "expert_ffn_size": INNER,
        "router": {"score": "sigmoid", "scale": 2.5},
        "balance": {"bias_update_rate": 0.01},
    },
    "slices": {"num_experts": 6, "top_k": 3, "expert_ffn_size": INNER // 3},
    "slices, two copies of each": {"num_experts": 8, "top_k": 4, "expert_ffn_size": INNER // 2},
    "slices, groups and a factor": {
        "num_experts": 16,
        "top_k": 4,
        "expert_ffn_size": INNER // 2,
        "router": {"score": "sigmoid", "scale": 1.7, "num_groups": 4, "top_k_groups": 2},
    },
    "a shared expert": {
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": INNER // 3,
        "shared_expert_ffn_size": INNER // 3,
    },
    "a shared expert beside copies": {
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": INNER // 2,
        "shared_expert_ffn_size": INNER // 2,
        "router": {"scale": 2.0},
        "capacity": {"factor": 0.5, "eval_factor": 0.5, "minimum": 1},
    },
}


def moe_config(folder: Path, moe: dict[str, Any], dense: dict[str, Any] = LLAMA, **model: Any) -> Config:
    """The MoE run; its first layer stays dense unless `model` says otherwise."""
    return make_config(folder, {"model": {**dense["model"], "dense_layers": 1, "num_layers": 3, **model}, "moe": moe})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save(make_config(folder, {"model": {**LLAMA["model"], "num_layers": 3}, "moe": None}), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize("name", EXACT)
def test_the_logits_are_those_of_the_dense_model(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = moe_config(tmp_path, EXACT[name])
    upcycle(llama, tmp_path / "out", config)
    assert "the same logits as the dense model: largest difference" in capsys.readouterr().out
    weights = tensors_of(tmp_path / "out")
    stored = {key: chunked(tensor) for key, tensor in weights.items()}
    dense = upcycling.read_dense(llama, config)
    agreement = compare(our_logits(config, stored), dense.logits())
    assert agreement.largest < 1e-5 * agreement.scale
    router = weights["model/blocks.1.ffn.deepspeed_moe.gate.wg.weight"]
    assert len(router.unique(dim=0)) == len(router) // cut_of(dense.config, config).slices, "copies do differ"
    assert torch.equal(
        weights["model/blocks.0.ffn.down.weight"], dense.tensors["model/blocks.0.ffn.down.weight"].read()
    )


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "left out, as before"])
def test_an_upcycled_model_with_a_selection_bias_is_exported(
    stored: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    if not stored:
        upcycled = upcycling.upcycled

        def without_bias(*arguments: Any) -> Tensors:
            return {key: t for key, t in upcycled(*arguments).items() if not key.endswith("balance.bias")}

        monkeypatch.setattr(upcycling, "upcycled", without_bias)
    upcycle(llama, tmp_path / "out", moe_config(tmp_path, EXACT["copies, sigmoid and a factor"]))
    assert (BIAS_KEY in tensors_of(tmp_path / "out")) == stored
    assert main(["checkpoint", "export", str(tmp_path / "out"), str(tmp_path / "theirs"), "--tokenizer", "none"]) == 0
    exported = load_file(tmp_path / "theirs" / "model.safetensors")
    assert exported["model.layers.1.mlp.gate.e_score_correction_bias"].tolist() == [0.0] * 4


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("slices", [1, 2])
def test_weights_that_are_not_normalised_are_scaled_to_nearly_the_same(
    score: str, slices: int, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router = {"score": score, "normalize_weights": False, "scale": 1.5}
    moe = {"num_experts": 8, "top_k": 2, "expert_ffn_size": INNER // slices, "router": router}
    config = moe_config(tmp_path, moe)
    upcycle(llama, tmp_path / "out", config)
    said = capsys.readouterr().out
    assert "near the dense model" in said
    assert "moe.router.normalize_weights is false" in said
    dense = upcycling.read_dense(llama, config)
    cut = cut_of(dense.config, config)
    near = compare(our_logits(config, upcycling.upcycled(dense, config, cut)), dense.logits())
    assert near.largest < 0.05 * near.scale
    unscaled = upcycling.Cut(cut.inner, cut.shared, cut.slices, 1.0, cut.router_std, False)
    far = compare(our_logits(config, upcycling.upcycled(dense, config, unscaled)), dense.logits())
    assert far.largest > 5 * near.largest


def test_any_score_says_what_weights_that_are_not_normalised_begin_with(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_entries.register(monkeypatch)
    router = {"normalize_weights": False, "scale": 1.5}
    config = moe_config(tmp_path, {"num_experts": 8, "top_k": 2, "expert_ffn_size": INNER, "router": router})
    assert config.moe is not None
    dense = upcycling.read_dense(llama, config).config
    for score, at_zero in (("softmax", 1 / 8), ("sigmoid", 1 / 2), ("softplus", math.log(2))):
        named = config.moe.router.model_copy(update={"score": score})
        other = config.model_copy(update={"moe": config.moe.model_copy(update={"router": named})})
        assert cut_of(dense, other).factor == pytest.approx(1 / (1.5 * 2 * at_zero), rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_hugging_face_model_is_upcycled(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dsmoe.interop.importing import fitting_sections

    save_theirs(name, tmp_path / name)
    sections = load_sections(fitting_sections(tmp_path / name))
    moe = {"num_experts": 4, "top_k": 2, "expert_ffn_size": INNER // 2}
    config = make_config(tmp_path, {"model": {**sections["model"], "dense_layers": 0, "ffn_size": None}, "moe": moe})
    upcycle(tmp_path / name, tmp_path / "out", config)


def test_noise_makes_every_expert_another_and_is_added_after_the_comparison(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = moe_config(tmp_path, EXACT["copies"])
    upcycle(llama, tmp_path / "without", config)
    capsys.readouterr()
    upcycle(llama, tmp_path / "with", config, noise=0.1)
    said = capsys.readouterr().out
    assert "the same logits" in said
    assert "before the noise of 0.1" in said
    before, after = tensors_of(tmp_path / "without"), tensors_of(tmp_path / "with")
    for key, tensor in after.items():
        ratio = float((tensor - before[key]).square().mean().sqrt() / before[key].square().mean().sqrt())
        assert ratio == (pytest.approx(0.1, rel=0.1) if ".experts." in key else 0.0)
    experts = after["model/blocks.1.ffn.deepspeed_moe.experts.down"]
    assert len((experts - before["model/blocks.1.ffn.deepspeed_moe.experts.down"]).unique(dim=0)) == len(experts)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"expert_ffn_size": 40}, "moe.expert_ffn_size (40) must divide the dense model's ffn_size (48)"),
    ({"expert_ffn_size": 32, "shared_expert_ffn_size": 32}, "(48) less moe.shared_expert_ffn_size (32)"),
    ({"shared_expert_ffn_size": 48}, "(48) less moe.shared_expert_ffn_size (48)"),
    ({"expert_ffn_size": 16}, "moe.num_experts (4) must be a multiple of 3"),
    ({"expert_ffn_size": 16, "num_experts": 6, "top_k": 2}, "moe.top_k (2) must be a multiple of 3"),
    (
        {"expert_ffn_size": 24, "num_experts": 12, "router": {"num_groups": 4, "top_k_groups": 2}},
        "moe.num_experts / moe.router.num_groups (3) must be a multiple of 2",
    ),
    ({"activation": "geglu"}, "moe.activation (geglu) must be swiglu"),
    ({"residual": True}, "moe.residual (true) must be false"),
    ({"router": {"choice": "expert"}}, "moe.router.choice (expert) must be token"),
    ({"router": {"force_balanced": True}}, "moe.router.force_balanced (true) must be false"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    config = moe_config(tmp_path, {**EXACT["copies"], **changes})
    with pytest.raises(UserError) as error:
        upcycle(llama, tmp_path / "out", config)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_model_or_none_at_all_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.rope_theta +10000.0 +5000.0"):
        upcycle(llama, tmp_path / "out", moe_config(tmp_path, EXACT["copies"], rope_theta=5e3))
    with pytest.raises(UserError, match=r"model.ffn_size +48 +96"):
        upcycle(llama, tmp_path / "out", moe_config(tmp_path, EXACT["copies"], ffn_size=96))
    upcycle(llama, tmp_path / "moe", moe_config(tmp_path, EXACT["copies"]))
    with pytest.raises(UserError, match="is an MoE model already"):
        upcycle(tmp_path / "moe", tmp_path / "out", moe_config(tmp_path, EXACT["copies"]))
    with pytest.raises(UserError, match="no MoE layers"):
        upcycle(llama, tmp_path / "out", make_config(tmp_path, QWEN3))
    with pytest.raises(UserError, match=r"neither a checkpoint nor .* nor is it a folder of Hugging Face's"):
        upcycle(tmp_path / "nothing", tmp_path / "out", moe_config(tmp_path, EXACT["copies"]))


def test_other_logits_end_it(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = upcycling._columns
    monkeypatch.setattr(upcycling, "_columns", lambda down, first, count: right(down, 0, count))
    with pytest.raises(UserError, match="the MoE model computes something else"):
        upcycle(llama, tmp_path / "out", moe_config(tmp_path, EXACT["slices"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_goes_on_from_the_dense_models_loss(tmp_path: Path) -> None:
    dense = make_config(tmp_path, LLAMA)
    save(dense, tmp_path / "dense")
    moe = {**EXACT["slices"], "balance": {"aux_loss": 0.0}}
    beginning = {"checkpoint": {"weights_from": str(tmp_path / "out")}}
    config = make_config(tmp_path, {"model": LLAMA["model"], "moe": moe}, **beginning, runs_dir=str(tmp_path / "moe"))
    upcycle(tmp_path / "dense", tmp_path / "out", config)
    from_dense = {"checkpoint": {"weights_from": str(tmp_path / "dense")}}
    expected = run_ranks(1, train_on, make_config(tmp_path, LLAMA, **from_dense))[0]
    alone = run_ranks(1, train_on, config)[0]
    assert alone[0] == pytest.approx(expected[0], rel=1e-5)
    spread = make_config(
        tmp_path, {"model": LLAMA["model"], "moe": moe}, **beginning, runs_dir=str(tmp_path / "two"), ranks=2, expert=2
    )
    assert run_ranks(2, train_on, spread)[0] == pytest.approx(alone, rel=1e-5)


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "moe.yaml"
    path.write_text(dump_config(moe_config(tmp_path, EXACT["slices"])), encoding="utf-8")
    arguments = ["checkpoint", "upcycle", str(llama), str(tmp_path / "out"), "--config", str(path), "--noise", "0.01"]
    assert main([*arguments, "moe.num_experts=4"]) == 2
    assert "moe.num_experts" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "every expert is one of 3 slices of the dense feed-forward" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 0
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
