"""A Hugging Face folder as a checkpoint: the same logits, any layout trains on, and what does not fit is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.cli import main
from dsmoe.config import load_config
from dsmoe.config.dump import dump_config
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.interop import importing
from dsmoe.interop.architectures import architecture_of
from dsmoe.interop.importing import fitting_sections, import_folder
from dsmoe.interop.sections import sections_of
from dsmoe.runtime.spawn import RanksFailedError, run_ranks
from tests.helpers.checkpoint_runs import take_steps, tensors_of
from tests.helpers.hugging_face_models import (
    COMMON,
    GLM4_MOE,
    THEIRS,
    load_sections,
    make_config,
    moe_model,
    save_theirs,
    train_on,
)
from tests.helpers.small_runs import make_trainer

transformers = pytest.importorskip("transformers")


def config_for(folder: Path, where: Path, **others: Any) -> Config:
    """The config that the printed sections make."""
    text = fitting_sections(folder)
    sections = load_sections(text)
    return make_config(where, sections, **others)


@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_saved_computes_the_same_here(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_theirs(name, tmp_path / name)
    config = config_for(tmp_path / name, tmp_path)
    import_folder(tmp_path / name, tmp_path / "checkpoint", config)
    assert "the same logits as transformers' model" in capsys.readouterr().out
    weights = {key: x.dtype for key, x in tensors_of(tmp_path / "checkpoint").items()}
    biases = {key for key in weights if key.startswith("buffer/")}
    assert biases == ({f"buffer/blocks.{n}.ffn.balance.bias" for n in (1, 2)} if name == "glm4_moe" else set())
    assert {weights[key] for key in weights if key not in biases} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_any_layout_trains_on(name: str, tmp_path: Path) -> None:
    save_theirs(name, tmp_path / name)
    base = config_for(tmp_path / name, tmp_path)
    import_folder(tmp_path / name, tmp_path / "checkpoint", base, check=False)
    checkpoint = {"weights_from": str(tmp_path / "checkpoint")}
    layouts = {
        "one rank": {"ranks": 1},
        "expert": {"ranks": 2, "expert": 2, "zero_stage": 2},
        "tensor": {"ranks": 2, "parallel": {"tensor": 2, "sequence": True, "expert_tensor": 1}},
    }
    figures = {}
    for layout, options in layouts.items():
        sections = {"model": base.model.model_dump(), "moe": base.moe and base.moe.model_dump()}
        others = {"train": {"micro_batch_size": 2}, "checkpoint": checkpoint, "runs_dir": str(tmp_path / layout)}
        config = make_config(tmp_path, sections, **others, **options)
        figures[layout] = run_ranks(options["ranks"], train_on, config)[0]
    assert figures["expert"] == pytest.approx(figures["one rank"], rel=1e-5)
    assert figures["tensor"] == pytest.approx(figures["one rank"], rel=1e-5)
    fresh = make_config(tmp_path, sections, **{**others, "checkpoint": {}})
    assert abs(run_ranks(1, begin_afresh, fresh)[0][0] - figures["one rank"][0]) > 0.01


def begin_afresh(config: Config) -> list[float]:
    return take_steps(make_trainer(config), 1)["losses"]


def test_a_run_that_wants_an_optimizers_state_is_told_that_there_is_none(tmp_path: Path) -> None:
    save_theirs("llama", tmp_path / "llama")
    config = config_for(tmp_path / "llama", tmp_path)
    import_folder(tmp_path / "llama", tmp_path / "checkpoint", config, check=False)
    with pytest.raises(RanksFailedError, match=r"is of another optimizer(.|\n)*none \(weights only\)"):
        run_ranks(1, resume, config, tmp_path / "checkpoint")


def resume(config: Config, checkpoint: Path) -> None:
    make_trainer(config).resume(checkpoint)


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias (true) must be false"),
    ("llama", {"mlp_bias": True}, "mlp_bias (true) must be false"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act (gelu) must be silu"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type (linear) must be default",
    ),
    (
        "glm4_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor (0.5) must be 1",
    ),
    ("mixtral", {"hidden_act": "relu"}, "hidden_act (relu) must be silu or gelu"),
    ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1}, "its MoE layers (0, 2, 3, 4) must be every n-th"),
    # What the loader would refuse in the sections that are printed.
    ("mixtral", {"num_key_value_heads": 3}, "model.num_kv_heads (3) must divide model.num_heads"),
    ("mixtral", {"num_experts_per_tok": 64}, "moe.top_k (64) must be at most moe.num_experts"),
    ("glm4_moe", {"n_group": 3}, "moe.router.num_groups (3)"),
    ("llama", {"rms_norm_eps": 0.0}, "model.norm_eps (0.0): Input should be greater than 0"),
    ("llama", {"num_hidden_layers": 0}, "model.num_layers (0): Input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("name", "changes", "message"), MISFITS)
def test_what_we_cannot_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    settings = {**COMMON, **THEIRS[name], "num_hidden_layers": 5, **changes}
    with pytest.raises(UserError) as error:
        sections_of(transformers.AutoConfig.for_model(name, **settings).to_dict())
    assert message in str(error.value)


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers (1000000000): "),
    ("qwen3", {"num_labels": 10**9}, "num_labels (1000000000): "),
    ("qwen3_moe", {"mlp_only_layers": [10**9]}, "mlp_only_layers.0 (1000000000): "),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers (3): "),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, 'rope_parameters.rope_theta ("x"): '),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters.rope_theta"),
    ("llama", {"rope_parameters": 5}, "rope_parameters (5): "),
    ("llama", {"hidden_size": "32"}, 'hidden_size ("32"): '),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads (0): "),
    ("llama", {"tie_word_embeddings": "no"}, 'tie_word_embeddings ("no"): '),
    ("llama", {"rms_norm_eps": []}, "rms_norm_eps ([]): "),
    ("llama", {"hidden_act": ["silu"]}, 'hidden_act (["silu"]): '),
    ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace (-1): "),
    ("glm4_moe", {"routed_scaling_factor": "2.5"}, 'routed_scaling_factor ("2.5"): '),
    ("llama", {"model_type": ["llama"]}, "model_type ['llama'] cannot be read"),
    ("llama", {"model_type": "bert", "num_labels": 10**9}, "model_type 'bert' cannot be read"),
]


@pytest.mark.parametrize(("name", "changes", "message"), IMPOSSIBLE)
def test_impossible_values_are_named_before_anything_is_made_of_them(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"model_type": name, **COMMON, **THEIRS[name], **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        fitting_sections(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", THEIRS)
def test_any_value_of_any_key_is_read_or_refused_without_a_traceback(name: str, tmp_path: Path) -> None:
    for key in sorted({**COMMON, **THEIRS[name]} | {"rope_theta": 1, "layer_types": 1, "sliding_window": 1}):
        for value in (None, True, -1, 0, 3, 2.5, 1e18, 10**30, float("nan"), "x", [], ["x"], {}, {"rope_theta": None}):
            settings = {"model_type": name, **COMMON, **THEIRS[name], key: value}
            (tmp_path / "config.json").write_text(json.dumps(settings))
            with suppress(UserError):
                load_sections(fitting_sections(tmp_path))


def test_initial_weights_of_0_are_not_the_loaders_concern() -> None:
    settings = {**COMMON, **THEIRS["mixtral"], "initializer_range": 0.0}
    assert "init_std" not in sections_of(transformers.AutoConfig.for_model("mixtral", **settings).to_dict())["model"]


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UserError, match=r"'deepseek_v3' cannot be read: its attention \(MLA\)"):
        architecture_of({"model_type": "deepseek_v3"})
    with pytest.raises(UserError, match=r"'gpt2' cannot be read; these can: mixtral, "):
        architecture_of({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("dense", "every", "first"),
    [
        ([], 1, (0, 1)),
        ([], 2, (0, 2)),
        ([0, 1], 1, (2, 1)),
        ([0], 3, (0, 3)),
        ([0, 1, 2, 3, 4], 1, (5, 1)),
        ([1, 3], 2, (5, 1)),
    ],
)
def test_the_pattern_of_the_layers_is_found(dense: list[int], every: int, first: tuple[int, int]) -> None:
    theirs = THEIRS["qwen3_moe"] | {"num_hidden_layers": 6, "mlp_only_layers": dense, "decoder_sparse_step": every}
    model = sections_of(transformers.AutoConfig.for_model("qwen3_moe", **COMMON | theirs).to_dict())["model"]
    assert (model["dense_layers"], model["moe_every"]) == first


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "mixtral"
    save_theirs("mixtral", folder, num_hidden_layers=1)
    return folder


def copy_with(folder: Path, where: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a folder with other tensors."""
    from safetensors.torch import load_file, save_file

    where.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, where / "model.safetensors")
    (where / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return where


GATE, W1 = "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.experts.3.w1.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda x: x.pop(W1), f"{W1} is missing"),
    "superfluous": (lambda x: x.update(other=x[GATE]), "other has no counterpart"),
    "of another shape": (lambda x: x.update({W1: x[W1][1:]}), f"{W1} has shape [47, 32] and should have [48, 32]"),
    "of integers": (lambda x: x.update({W1: x[W1].to(torch.int8)}), f"{W1} is of type I8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_the_models_are_named(change: str, mixtral: Path, tmp_path: Path) -> None:
    apply, message = CHANGES[change]
    folder = copy_with(mixtral, tmp_path / "changed", apply)
    with pytest.raises(UserError) as error:
        import_folder(folder, tmp_path / "out", config_for(mixtral, tmp_path))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_may_be_there_twice_but_not_differ(tmp_path: Path) -> None:
    save_theirs("qwen3", tmp_path / "qwen3")
    config = config_for(tmp_path / "qwen3", tmp_path)
    twice = copy_with(tmp_path / "qwen3", tmp_path / "twice", lambda x: x.update({HEAD: x[TABLE]}))
    import_folder(twice, tmp_path / "out", config)
    differing = copy_with(tmp_path / "qwen3", tmp_path / "differing", lambda x: x.update({HEAD: x[TABLE] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight has no counterpart"):
        import_folder(differing, tmp_path / "other", config)


def test_a_selection_bias_that_our_model_would_lack_is_not_lost(tmp_path: Path) -> None:
    save_theirs("glm4_moe", tmp_path / "glm")
    sections = load_sections(fitting_sections(tmp_path / "glm"))
    config = make_config(tmp_path, moe_model(sections, balance={"bias_update_rate": 0.0}))
    with pytest.raises(UserError, match=r"e_score_correction_bias is not zero; set moe.balance.bias_update_rate above"):
        import_folder(tmp_path / "glm", tmp_path / "out", config)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_file_is_found(left: int, mixtral: Path, tmp_path: Path) -> None:
    config = config_for(mixtral, tmp_path)
    folder = copy_with(mixtral, tmp_path / "short", lambda _: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        import_folder(folder, tmp_path / "out", config, check=False)


def test_what_is_behind_the_tensors_is_found(mixtral: Path, tmp_path: Path) -> None:
    folder = copy_with(mixtral, tmp_path / "long", lambda _: None)
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(UserError, match=r"has [\d,]+ bytes, and its header describes"):
        import_folder(folder, tmp_path / "out", config_for(mixtral, tmp_path), check=False)


def test_a_missing_file_and_a_wrong_index_are_found(tmp_path: Path) -> None:
    save_theirs("llama", tmp_path / "whole")
    config = config_for(tmp_path / "whole", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    import_folder(tmp_path / "cut", tmp_path / "fine", config)
    first, second = sorted((tmp_path / "cut").glob("*.safetensors"))[:2]
    index = tmp_path / "cut" / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    moved = next(name for name, place in content["weight_map"].items() if place == first.name)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {moved: second.name}}), encoding="utf-8")
    with pytest.raises(UserError, match=f"{second.name} lacks {moved}"):
        import_folder(tmp_path / "cut", tmp_path / "out", config)
    index.write_text(json.dumps({"weight_map": {moved: "../whole/model.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match="a file outside of the folder"):
        import_folder(tmp_path / "cut", tmp_path / "out", config)
    index.write_text(json.dumps(content), encoding="utf-8")
    first.unlink()
    with pytest.raises(UserError, match=f"cannot read .*{first.name}"):
        import_folder(tmp_path / "cut", tmp_path / "out", config)
    index.unlink()
    with pytest.raises(UserError, match="pickled weights"):
        import_folder(tmp_path / "cut", tmp_path / "out", config)


def test_another_models_config_is_refused_with_what_differs_and_what_fits(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        import_folder(mixtral, tmp_path / "out", make_config(tmp_path, GLM4_MOE))
    for expected in (r"moe\.num_experts +4 +8\n", r"moe\.router\.score +softmax +sigmoid\n", r"\nmodel:\n"):
        assert re.search(expected, str(error.value))


def test_longer_than_the_window_is_refused(mixtral: Path, tmp_path: Path) -> None:
    sections = load_sections(fitting_sections(mixtral))
    assert sections["model"]["max_sequence_length"] == 32
    sections["model"]["max_sequence_length"] = 33
    with pytest.raises(UserError, match=r"max_sequence_length \(33\) must be at most 32"):
        import_folder(mixtral, tmp_path / "out", make_config(tmp_path, sections))


def test_other_logits_end_it_and_leave_nothing(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(mixtral, tmp_path)
    right = importing.folder_tensors

    def swapped(*arguments: Any) -> Any:
        found = dict(right(*arguments))
        found["model/blocks.0.ffn_norm.weight"] = found["model/blocks.0.attention_norm.weight"]
        return found

    monkeypatch.setattr(importing, "folder_tensors", swapped)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"our model computes something else: largest difference"):
        import_folder(mixtral, tmp_path / "out", config)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "import", str(mixtral)]) == 0
    sections = load_sections(capsys.readouterr().out)
    assert main(["checkpoint", "import", str(mixtral), str(tmp_path / "out")]) == 2
    assert "--config CONFIG" in capsys.readouterr().err
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(make_config(tmp_path, sections)), encoding="utf-8")
    assert main(["checkpoint", "import", str(mixtral), "--config", str(path)]) == 2
    assert "say where as well" in capsys.readouterr().err
    to = ["checkpoint", "import", str(mixtral), str(tmp_path / "out"), "--config", str(path)]
    assert main([*to, "model.hidden_size=8"]) == 2
    assert "model.hidden_size" in capsys.readouterr().err
    assert main([*to, "name=overridden"]) == 0
    assert f"checkpoint.weights_from={tmp_path / 'out'}" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 0
    assert main(["checkpoint", "show", str(tmp_path / "out"), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert f"import of {mixtral}" in shown
    assert "run overridden" in shown
    assert load_config(path).moe == make_config(tmp_path, sections).moe
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "out"), "--config", str(path)]) == 2
    assert "is not a folder of Hugging Face's" in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"pip install 'dsmoe\[hf\]'"):
        fitting_sections(tmp_path)


def test_a_model_without_a_bias_may_get_one(mixtral: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, moe_model(load_sections(fitting_sections(mixtral)), balance={"bias_update_rate": 0.1})
    )
    import_folder(mixtral, tmp_path / "out", config)
