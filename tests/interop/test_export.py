"""A checkpoint as a Hugging Face folder: transformers loads it, computes the same, generates, and gives it back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmoe.checkpoint.headers import BYTES
from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.cli import main
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Model, Moe, Router
from dsmoe.data.tokenizer import ByteTokenizer
from dsmoe.interop import export as exporting
from dsmoe.interop.architectures import ARCHITECTURES, choose
from dsmoe.interop.architectures.architecture import Architecture
from dsmoe.interop.export import export
from dsmoe.interop.importing import import_folder
from dsmoe.interop.model_files import read_header, whole_folder
from dsmoe.interop.tensors import checkpoint_tensors
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.checkpoint_runs import folder_of, layout_config, save_between, tensors_of
from tests.helpers.hugging_face_models import GLM4_MOE, LLAMA, MIXTRAL, QWEN3, QWEN3_MOE, make_config, moe_model, save

transformers = pytest.importorskip("transformers")

MODELS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "glm4_moe": GLM4_MOE, "llama": LLAMA, "qwen3": QWEN3}
VARIANTS = {
    "glm4_moe without shared expert, bias and groups": moe_model(
        GLM4_MOE,
        moe={"shared_expert_ffn_size": None},
        router={"num_groups": 1, "top_k_groups": 1, "normalize_weights": False, "scale": 1.0},
        balance={"bias_update_rate": 0.0},
    ),
    "mixtral with geglu": moe_model(MIXTRAL, moe={"activation": "geglu"}, router={"noise": "jitter"}),
    "mixtral with a capacity": moe_model(MIXTRAL, capacity={"factor": 0.5, "eval_factor": 0.5, "minimum": 1}),
    "qwen3_moe with its experts everywhere": moe_model(QWEN3_MOE, model={"moe_every": 1, "dense_layers": 0}),
}


@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_transformers_loads_it_computes_the_same_generates_and_gives_it_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, {**MODELS, **VARIANTS}[name])
    tensors = save(config, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp32")
    said = capsys.readouterr().out
    assert f"as {name.partition(' ')[0]} in fp32" in said
    assert "the same logits" in said

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("Two times two", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == ByteTokenizer().encode("Two times two").tolist()
    written = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 18)
    assert isinstance(tokenizer.decode(written[0]), str)

    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    import_folder(tmp_path / "again", tmp_path / "back", config)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor.read()), key


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_bf16_rounds_the_weights_and_not_the_selection_bias(name: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, MODELS[name])
    tensors = save(config, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "back", config)
    for key, tensor in tensors_of(tmp_path / "back").items():
        stored = tensors[key].read()
        assert torch.equal(tensor, stored if key.startswith("buffer") else stored.bfloat16()), key


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", QWEN3_MOE, "model.qk_norm (true) must be false"),
    ("mixtral", QWEN3_MOE, "model.dense_layers (1) and model.moe_every (2) must be 0 and 1"),
    ("mixtral", QWEN3_MOE, "moe.router.normalize_weights (false) must be true"),
    ("mixtral", GLM4_MOE, 'moe.router.score ("sigmoid") must be "softmax"'),
    ("mixtral", GLM4_MOE, "moe.router.scale (2.5) must be 1.0"),
    ("mixtral", GLM4_MOE, "moe.router.num_groups (4) must be 1"),
    ("mixtral", GLM4_MOE, "moe.balance.bias_update_rate (0.001) must be 0.0"),
    ("mixtral", GLM4_MOE, "moe.shared_expert_ffn_size (32) must be null"),
    ("mixtral", LLAMA, "moe (null) must be there"),
    ("mixtral", moe_model(MIXTRAL, moe={"residual": True}), "moe.residual (true) must be false"),
    (
        "mixtral",
        moe_model(MIXTRAL, moe={"activation": "relu2"}),
        'moe.activation ("relu2") must be "swiglu" or "geglu"',
    ),
    ("mixtral", moe_model(MIXTRAL, router={"force_balanced": True}), "moe.router.force_balanced (true) must be false"),
    ("mixtral", moe_model(MIXTRAL, router={"choice": "expert"}), 'moe.router.choice ("expert") must be "token"'),
    ("qwen3_moe", MIXTRAL, "model.qk_norm (false) must be true"),
    ("qwen3_moe", GLM4_MOE, "moe.shared_expert_ffn_size (32) must be null"),
    (
        "qwen3_moe",
        moe_model(QWEN3_MOE, moe={"activation": "geglu"}),
        "moe.activation (geglu) must be swiglu where there",
    ),
    ("glm4_moe", MIXTRAL, 'moe.router.score ("softmax") must be "sigmoid"'),
    (
        "glm4_moe",
        moe_model(GLM4_MOE, model={"num_layers": 5, "moe_every": 2}),
        "model.moe_every (2) must be 1: dense layers (0, 1, 3)",
    ),
    ("glm4_moe", moe_model(GLM4_MOE, router={"group_score": "max"}), "moe.router.group_score (max) must be top2_sum"),
    ("glm4_moe", moe_model(GLM4_MOE, moe={"shared_expert_ffn_size": 24}), "moe.shared_expert_ffn_size (24) must be a"),
    ("llama", MIXTRAL, "moe must be null"),
    ("llama", QWEN3, "model.qk_norm (true) must be false"),
    ("mistral", QWEN3, "model.qk_norm (true) must be false"),
    ("qwen3", LLAMA, "model.qk_norm (false) must be true"),
]


@pytest.mark.parametrize(("architecture", "sections", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(
    architecture: str, sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        choose(make_config(tmp_path, sections), architecture)
    assert f"{architecture}: {message}" in str(error.value)


def test_every_option_of_an_moe_layer_is_written_refused_or_of_training_alone(tmp_path: Path) -> None:
    refused = {need.key for architecture in ARCHITECTURES.values() for need in architecture.needs}
    refused |= {"moe.router.group_score"}
    written = {f"moe.{key}" for key in ("num_experts", "top_k", "expert_ffn_size")} | {"moe.router.top_k_groups"}
    training = {"moe.router", "moe.balance", "moe.capacity", "moe.router.noise", "moe.router.leak_future"}
    keys = {f"moe.{key}" for key in Moe.model_fields} | {f"moe.router.{key}" for key in Router.model_fields}
    assert keys == keys & (refused | written | training)


@pytest.mark.parametrize("key", Model.model_fields)
def test_every_option_of_the_transformer_is_written_or_refused(key: str, tmp_path: Path) -> None:
    def described(config: Config, architecture: Architecture) -> object:
        return architecture.refusals(config) or architecture.export(config)

    differs = []
    for name, sections in MODELS.items():
        config = make_config(tmp_path, sections)
        value = getattr(config.model, key)
        other = not value if isinstance(value, bool) else (value or 8) * 2
        changed = config.model_copy(update={"model": config.model.model_copy(update={key: other})})
        differs.append(described(config, ARCHITECTURES[name]) != described(changed, ARCHITECTURES[name]))
    # Keys of dense layers, and of their place among others, mean nothing in models that have one kind of layer.
    assert any(differs) if key in ("ffn_size", "dense_layers", "moe_every") else all(differs)


def test_deepseek_v3_itself_is_refused_and_the_way_out_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MLA.*glm4_moe"):
        choose(make_config(tmp_path, GLM4_MOE), "deepseek_v3")


def test_where_nothing_fits_all_reasons_are_given(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        choose(make_config(tmp_path, moe_model(MIXTRAL, moe={"residual": True})), None)
    for name in ("mixtral", "qwen3_moe", "glm4_moe"):
        assert f"{name}: moe.residual (true) must be false" in str(error.value)
    assert "llama" not in str(error.value)


def test_other_logits_end_it_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, MIXTRAL)
    save(config, tmp_path / "checkpoint")
    right = Architecture.export

    def wrong(*arguments: Any) -> dict[str, Any]:
        rotary = {"rope_type": "default", "rope_theta": 1e4}
        return right(*arguments) | {"rope_theta": 1e4, "rope_parameters": rotary}

    monkeypatch.setattr(Architecture, "export", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"computes something else: largest difference"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_run_of_any_layout_is_exported(tmp_path: Path) -> None:
    sections = {"model": {"qk_norm": True, "ffn_size": 64}, "moe": {**GLM4_MOE["moe"], "num_experts": 4, "top_k": 2}}
    sections["moe"]["router"] = {"score": "sigmoid", "num_groups": 2, "top_k_groups": 1}
    layout = {"tensor": 2, "expert": 2, "expert_tensor": 2, "zero": 2}
    config = layout_config(tmp_path, 4, **layout, **sections)
    run_ranks(4, save_between, config, 2, 0)
    [checkpoint] = folder_of(config).iterdir()
    export(checkpoint, tmp_path / "out", dtype="fp32")
    import_folder(tmp_path / "out", tmp_path / "back", config)
    stored = tensors_of(checkpoint)
    for key, tensor in tensors_of(tmp_path / "back").items():
        assert torch.equal(tensor, stored[key]), key


def test_files_are_no_larger_than_asked_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    save(make_config(tmp_path, MIXTRAL), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", shard_bytes=20_000, check=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 6)]
    total = 0
    for file in files:
        entries = read_header(file)
        size = sum(BYTES[entry.dtype] * torch.Size(entry.shape).numel() for entry in entries.values())
        assert size <= 20_000
        total += size
        assert {name for name, place in index["weight_map"].items() if place == file.name} == entries.keys()
    assert index["metadata"]["total_size"] == total


MEASURE = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from dsmoe.interop.export import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(Path(sys.argv[1]), Path(sys.argv[2]), check=False, dtype="fp32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    sections = moe_model(MIXTRAL, model={"hidden_size": 256, "num_layers": 4}, moe={"num_experts": 16})
    sections["moe"]["expert_ffn_size"] = 512
    save(make_config(tmp_path, sections), tmp_path / "checkpoint")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    grown = int(output.split()[-1]) * 1024
    assert size > 100e6
    assert grown < 0.2 * size, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_every_byte_has_its_number(tmp_path: Path) -> None:
    save(make_config(tmp_path, MIXTRAL), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", check=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "".join(map(chr, range(0x250))) + "日本 🙂  \n\t end"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == ByteTokenizer.end_of_document


def test_a_tokenizer_that_is_gone_or_another_one_is_refused(tmp_path: Path) -> None:
    data = {"tokenizer": str(tmp_path / "gone.json")}
    save(make_config(tmp_path, MIXTRAL, data=data), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"gone.json \(data.tokenizer\) is not there; .* --tokenizer FILE"):
        export(tmp_path / "checkpoint", tmp_path / "out", check=False)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(n): n for n in range(300)})).save(str(tmp_path / "large.json"))
    with pytest.raises(UserError, match=r"has token 299, and model.vocab_size is 264"):
        export(tmp_path / "checkpoint", tmp_path / "out", check=False, tokenizer=str(tmp_path / "large.json"))
    Tokenizer(models.WordLevel({"</s>": 3, "a": 4})).save(str(tmp_path / "own.json"))
    export(tmp_path / "checkpoint", tmp_path / "out", check=False, tokenizer=str(tmp_path / "own.json"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 3
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 3
    export(tmp_path / "checkpoint", tmp_path / "none", check=False, tokenizer="none")
    assert not list((tmp_path / "none").glob("tokenizer*"))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save(make_config(tmp_path, MIXTRAL), tmp_path / "checkpoint")
    file = next((tmp_path / "checkpoint").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged"):
        export(tmp_path / "checkpoint", tmp_path / "out")


def test_tensors_that_are_not_the_models_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path, MIXTRAL)
    tensors = dict(save(config, tmp_path / "checkpoint"))
    del tensors["model/norm.weight"]
    tensors["model/other"] = tensors["model/head.weight"]
    pairs = list(exporting.matches(config, ARCHITECTURES["mixtral"].names))
    with pytest.raises(UserError, match=r"model/norm.weight is missing\n  model/other has no counterpart"):
        exporting.check_complete(tmp_path, tensors, pairs)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial" / "half"
    left.mkdir(parents=True)  # of a process that was killed
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(UserError, match="is there already"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_config(tmp_path, QWEN3_MOE), tmp_path / "checkpoint")
    arguments = ["checkpoint", "export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    assert main([*arguments, "--format", "mixtral"]) == 2
    assert "model.qk_norm (true) must be false" in capsys.readouterr().err
    huge = SimpleNamespace(parameters=SimpleNamespace(total=10**15))
    monkeypatch.setattr("dsmoe.interop.logits.Plan", SimpleNamespace(from_config=lambda _: huge))
    assert main(arguments) == 2
    assert "about 7450581 GiB" in capsys.readouterr().err
    assert main([*arguments, "--no-check", "--dtype", "fp32", "--shard-gb", "0.0001"]) == 0
    assert "not compared with transformers' model (--no-check)" in capsys.readouterr().out
    tensors = checkpoint_tensors(tmp_path / "checkpoint", exporting.verify(tmp_path / "checkpoint"))
    table = tensors["model/embedding.weight"].read()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, table)
