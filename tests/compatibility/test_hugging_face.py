"""Hugging Face folders of before the code was rebuilt are imported as the same models, and exported as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsmoe.cli import main as command
from dsmoe.config import load_config
from tests.helpers.stored_files import DATA, HUGGING_FACE, copy_for, inside, loss_of

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

FOLDERS = DATA / "hugging_face"
LOSSES = json.loads((FOLDERS / "losses.json").read_text(encoding="utf-8"))
"""Of transformers' models."""


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_imported_model_has_the_loss_that_transformers_found(name: str, tmp_path: Path) -> None:
    work = copy_for(tmp_path)
    shutil.copytree(FOLDERS / name, work / "theirs")
    config = f"yaml/{HUGGING_FACE[name]}.yaml"
    with inside(work):
        assert command(["checkpoint", "import", "theirs", "imported", "--config", config]) == 0
        assert command(["checkpoint", "verify", "imported"]) == 0
        assert loss_of(load_config(config), work / "imported") == pytest.approx(LOSSES[name], rel=1e-5)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_run_is_exported_as_it_was(name: str, tmp_path: Path) -> None:
    work = copy_for(tmp_path, HUGGING_FACE[name])
    dtype = "fp32" if name == "mixtral" else "bf16"
    with inside(work):
        options = ["--format", name, "--dtype", dtype]
        assert command(["checkpoint", "export", f"runs/{HUGGING_FACE[name]}", "ours", *options]) == 0
    before, now = (safetensors.load_file(folder / "model.safetensors") for folder in (FOLDERS / name, work / "ours"))
    assert before.keys() == now.keys()
    assert all(torch.equal(now[key], tensor) and now[key].dtype == tensor.dtype for key, tensor in before.items())
    for file in sorted(path.name for path in (FOLDERS / name).glob("*.json")):
        there, here = (
            json.loads((folder / file).read_text(encoding="utf-8")) for folder in (FOLDERS / name, work / "ours")
        )
        versions = {"transformers_version": None}
        assert there | versions == here | versions, file
