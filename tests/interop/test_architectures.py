"""The registry of architectures: all that depends on a name is in its entry, and an entry is all that one needs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.cli import main
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.config.sections.base import Devices, Width
from dsmoe.interop.architectures import ARCHITECTURES, REFUSED, choose
from dsmoe.interop.architectures.architecture import Architecture, Experts
from dsmoe.interop.architectures.glm4_moe import GLM4_MOE as GLM4_MOE_ENTRY
from dsmoe.interop.architectures.parts import HAS_EXPERTS, SOFTMAX, Count, LayerIndex, Need, Settings
from dsmoe.interop.export import export
from dsmoe.interop.importing import fitting_sections, import_folder
from dsmoe.interop.model_files import read_header
from dsmoe.interop.names import Names
from dsmoe.interop.settings import check_settings
from dsmoe.plan.layers import dense_layers
from tests.helpers.checkpoint_runs import tensors_of
from tests.helpers.hugging_face_models import (
    COMMON,
    GLM4_MOE,
    LLAMA,
    MIXTRAL,
    load_sections,
    make_config,
    moe_model,
    save,
)

transformers = pytest.importorskip("transformers")
REPOSITORY = Path(__file__).parents[2]
FAMILIES = {re.findall(r"[a-z]+", name)[0] for name in [*ARCHITECTURES, *REFUSED]}


def words_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield what code can decide by: names of things, and text that is one word."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\S+", node.value):
            yield node.lineno, node.value
        for kind, attribute in ((ast.Name, "id"), (ast.Attribute, "attr"), (ast.arg, "arg"), (ast.FunctionDef, "name")):
            if isinstance(node, kind):
                yield node.lineno, getattr(node, attribute)
        if isinstance(node, ast.keyword) and node.arg:
            yield node.lineno, node.arg


def test_no_code_but_the_entries_goes_by_an_architectures_name() -> None:
    package = REPOSITORY / "dsmoe" / "interop" / "architectures"
    shared = [package / f"{name}.py" for name in ("architecture", "parts")]
    entries = set(package.glob("*.py")) - {*shared}  # `__init__` imports them by name
    files = set((REPOSITORY / "dsmoe").rglob("*.py")) - entries
    assert files > set(shared)
    found = [
        f"{file.relative_to(REPOSITORY)}:{line}: {word}"
        for file in sorted(files)
        for line, word in words_of(file)
        if any(family in word.lower() for family in FAMILIES)
    ]
    assert found == []
    registry = (package / "__init__.py").read_text(encoding="utf-8")
    strings = [n.value for n in ast.walk(ast.parse(registry)) if isinstance(n, ast.Constant)]
    assert not {*ARCHITECTURES, *REFUSED} & {s for s in strings if isinstance(s, str)}


def test_that_search_finds_names(tmp_path: Path) -> None:
    code = 'if kind == "mixtral" or kind in ("qwen3", x):\n    _llama(mistral=y.glm4)\n    f"like mixtral here"'
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    found = {word for _, word in words_of(tmp_path / "code.py")}
    assert {"mixtral", "qwen3", "_llama", "mistral", "glm4"} < found
    assert not any(" " in word for word in found)


def test_the_help_and_the_documentation_name_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", "--help"])
    shown = capsys.readouterr().out
    documentation = (REPOSITORY / "docs" / "interop.md").read_text(encoding="utf-8")
    for name, entry in ARCHITECTURES.items():
        assert name == entry.name
        assert re.search(rf"\b{name}\b", shown), name
        assert f"`{name}`" in documentation, name


@pytest.mark.parametrize("name", ["nothing", "deepseek_v2"])
def test_an_unknown_format_is_refused_with_those_that_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        choose(make_config(tmp_path, MIXTRAL), name)
    names = "mixtral, qwen3_moe, glm4_moe, llama, qwen3, mistral"
    assert str(error.value) == f"there is no format '{name}'; give one of {names}"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"model_type '{name}' cannot be read.*; these can: {names}"):
        fitting_sections(tmp_path)


class MadeUpConfig(transformers.PreTrainedConfig):
    """Keys that transformers needs of any architecture to read its config."""

    model_type = "made_up"


def made_up_settings(config: Config) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "intermediate_size": config.model.ffn_size or 1,
        "expert_count": config.moe.num_experts,
        "expert_width": config.moe.expert_ffn_size,
        "experts_each": config.moe.top_k,
        "experts_from": len(dense_layers(config)),
        "twice_shared": (config.moe.shared_expert_ffn_size or 0) // 2,
    }


def made_up_section(settings: Settings) -> dict[str, Any]:
    return {
        "num_experts": settings["expert_count"],
        "top_k": settings["experts_each"],
        "expert_ffn_size": settings["expert_width"],
        "shared_expert_ffn_size": 2 * settings["twice_shared"],
        "router": {"normalize_weights": False},
    }


def made_up_misfits(config: Config) -> Iterator[str]:
    if config.moe is not None and (config.moe.shared_expert_ffn_size or 1) % 2:
        yield f"moe.shared_expert_ffn_size ({config.moe.shared_expert_ffn_size}) must be even"


def made_up_settings_misfits(settings: Settings) -> Iterator[str]:
    if settings.get("backwards"):
        yield "backwards (true) must be false: we read forwards"


MADE_UP = Architecture(
    name="made_up",
    class_name="MadeUpForCausalLM",
    settings=made_up_settings,
    names=Names("mixture", ("opened", "raised", "lowered"), shared="everybody"),
    keys={
        "expert_count": Count,
        "expert_width": Width,
        "experts_each": Devices,
        "experts_from": LayerIndex,
        "twice_shared": Count,
    },
    optional_keys={"backwards": bool},
    qk_norm=True,
    needs=(
        *HAS_EXPERTS,
        *(need for need in SOFTMAX if "shared" not in need.key),
        Need("moe.router.normalize_weights", (False,), "its weights are the scores"),
    ),
    misfits=made_up_misfits,
    settings_misfits=made_up_settings_misfits,
    experts=Experts(
        layers=lambda settings: list(range(settings["experts_from"], settings["num_hidden_layers"])),
        section=made_up_section,
    ),
)
MADE_UP_MODEL: dict[str, Any] = {
    "model": {"qk_norm": True, "num_layers": 3, "dense_layers": 1, "ffn_size": 48},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": 24,
        "shared_expert_ffn_size": 10,
        "router": {"normalize_weights": False},
    },
}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    monkeypatch.setitem(ARCHITECTURES, "made_up", MADE_UP)


@pytest.mark.usefixtures("made_up")
def test_an_entry_alone_makes_a_new_architecture_of_export_and_import(tmp_path: Path) -> None:
    config = make_config(tmp_path, MADE_UP_MODEL)
    tensors = save(config, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp32", check=False)  # the only one that fits
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (written["model_type"], written["architectures"]) == ("made_up", ["MadeUpForCausalLM"])
    assert [written[key] for key in MADE_UP.keys] == [4, 24, 2, 1, 5]
    names = read_header(tmp_path / "out" / "model.safetensors").keys()
    assert {f"model.layers.1.mixture.experts.3.{part}.weight" for part in ("opened", "raised", "lowered")} < names
    assert "model.layers.2.mixture.everybody.gate_proj.weight" in names
    assert "model.layers.0.mlp.gate_proj.weight" in names

    sections = load_sections(fitting_sections(tmp_path / "out"))
    back = make_config(tmp_path, sections)
    assert back.moe == config.moe
    differing = {
        key
        for key, value in config.model.model_dump().items()
        if getattr(back.model, key) not in (value, value or config.model.hidden_size // config.model.num_heads)
    }
    assert differing <= {"num_kv_heads", "head_dim"}  # written out, where ours leaves them to be derived
    import_folder(tmp_path / "out", tmp_path / "back", back, check=False)
    again = tensors_of(tmp_path / "back")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor.read()), key


@pytest.mark.usefixtures("made_up")
def test_an_entrys_reasons_and_the_types_of_its_keys_are_told(tmp_path: Path) -> None:
    refused = {
        "moe.shared_expert_ffn_size (9) must be even": moe_model(MADE_UP_MODEL, moe={"shared_expert_ffn_size": 9}),
        "model.qk_norm (false) must be true: its attention norms": moe_model(MADE_UP_MODEL, model={"qk_norm": False}),
        "moe.router.normalize_weights (true) must be false: its weights are the scores": moe_model(
            MADE_UP_MODEL, router={"normalize_weights": True}
        ),
        "moe (null) must be there: it has experts": LLAMA,
    }
    for message, sections in refused.items():
        with pytest.raises(UserError) as error:
            choose(make_config(tmp_path, sections), "made_up")
        assert f"\n  made_up: {message}" in str(error.value)
    settings = {"model_type": "made_up", "expert_count": 4, "experts_each": 2, "expert_width": 24, "experts_from": 1}
    settings = {**COMMON, **settings, "twice_shared": 5, "hidden_act": "silu", "tie_word_embeddings": False}
    for changes, message in (
        ({"expert_count": "4"}, 'expert_count ("4"): '),
        ({"experts_from": -1}, "experts_from (-1): "),
        ({"twice_shared": None}, "there is no twice_shared; a model of this type has a value for each"),
        ({"backwards": 3}, "backwards (3): "),
        ({"backwards": True}, "backwards (true) must be false: we read forwards"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}), encoding="utf-8")
        with pytest.raises(UserError) as error:
            fitting_sections(tmp_path)
        assert message in str(error.value)


def test_an_entrys_type_of_a_key_counts_for_its_own_configs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(MADE_UP, optional_keys={"sliding_window": list[int], "n_group": str})
    monkeypatch.setitem(ARCHITECTURES, "made_up", entry)
    given = {"sliding_window": [8, 16], "n_group": "first"}
    assert check_settings({"model_type": "made_up", **given}, with_defaults=False) == {"model_type": "made_up", **given}
    for name, key in (("glm4_moe", "n_group"), ("llama", "sliding_window")):
        with pytest.raises(UserError, match=rf"  {key} \("):
            check_settings({"model_type": name, **given}, with_defaults=False)


def test_an_architecture_of_transformers_joins_by_an_entry_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dots1 has GLM-4-MoE's layers, and norms queries and keys always."""
    settings = GLM4_MOE_ENTRY.settings

    def without_the_key(config: Config) -> dict[str, Any]:
        return {key: value for key, value in settings(config).items() if key != "use_qk_norm"}

    entry = replace(GLM4_MOE_ENTRY, name="dots1", class_name="Dots1ForCausalLM", settings=without_the_key, qk_norm=True)
    monkeypatch.setitem(ARCHITECTURES, "dots1", entry)
    config = make_config(tmp_path, GLM4_MOE)
    tensors = save(config, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", architecture="dots1", dtype="fp32")
    assert "the same logits from transformers' model" in capsys.readouterr().out
    import_folder(tmp_path / "out", tmp_path / "back", config)
    assert "the same logits as transformers' model" in capsys.readouterr().out
    again = tensors_of(tmp_path / "back")
    assert all(torch.equal(again[key], tensor.read()) for key, tensor in tensors.items())
