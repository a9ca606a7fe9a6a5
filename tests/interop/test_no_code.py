"""Nobody's Python runs because dsmoe reads their folder, not even where standard input answers `y`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe import cli
from dsmoe.config.dump import dump_config
from tests.helpers.hugging_face_models import load_sections, make_config, save_theirs

pytest.importorskip("transformers")
REPOSITORY = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import MixtralConfig, MixtralForCausalLM
class OwnConfig(MixtralConfig):
    model_type = {model_type!r}
class OwnModel(MixtralForCausalLM):
    config_class = OwnConfig
def generate(*args, **kwargs):
    pass
"""
CLASSES = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoTokenizer": ["own.OwnConfig"] * 2,
}


def armed(folder: Path, model_type: str, mark: Path, **changes: object) -> Path:
    """A folder of a whole Mixtral model that would run Python of its own, wherever a library looks for some."""
    save_theirs("mixtral", folder)
    config = folder / "config.json"
    settings = (
        json.loads(config.read_text(encoding="utf-8")) | {"model_type": model_type, "auto_map": CLASSES} | changes
    )
    config.write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None}), encoding="utf-8"
    )
    code = CODE.format(mark=str(mark), model_type=model_type)
    for name in ("own.py", "custom_generate/generate.py", f"{folder.name}.py", "__init__.py", "sitecustomize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
    return folder


def answering_yes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which reads `y` from standard input as often as it asks."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dsmoe", *arguments]
    return subprocess.run(
        command, input="y\n" * 100, capture_output=True, text=True, env=environment, check=False, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsmoe.interop.importing import fitting_sections

    folder = tmp_path_factory.mktemp("plain")
    save_theirs("mixtral", folder / "mixtral")
    path = folder / "run.yaml"
    path.write_text(
        dump_config(make_config(folder, load_sections(fitting_sections(folder / "mixtral")))), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("classes", [CLASSES, {"AutoConfig": "somebody/elsewhere--own.OwnConfig"}])
def test_a_folder_that_needs_its_own_code_is_refused_and_runs_nothing(classes: dict[str, str], tmp_path: Path) -> None:
    folder = armed(tmp_path / "theirs", "own_mixtral", tmp_path / "mark", auto_map=classes)
    done = answering_yes("checkpoint", "import", str(folder))
    assert done.returncode == 2
    assert not (tmp_path / "mark").exists()
    assert done.stderr == (
        f"error: {folder / 'config.json'} names Python of its own (auto_map) for model_type 'own_mixtral', and dsmoe "
        "runs no code of a folder; only architectures that are in transformers itself can be read\n"
    )


@pytest.mark.parametrize("action", ["print", "import", "upcycle"])
def test_a_known_model_is_read_without_its_folders_code(action: str, tmp_path: Path, run_yaml: Path) -> None:
    folder = armed(tmp_path / "theirs", "mixtral", tmp_path / "mark", attn_implementation="somebody/kernel")
    arguments = {
        "print": ["import", str(folder)],
        "import": ["import", str(folder), str(tmp_path / "out"), "--config", str(run_yaml)],
        "upcycle": ["upcycle", str(folder), str(tmp_path / "out"), "--config", str(run_yaml)],
    }[action]
    done = answering_yes("checkpoint", *arguments)
    assert not (tmp_path / "mark").exists()
    assert "Traceback" not in done.stderr
    assert "wish to run" not in done.stdout
    # A Mixtral model is no dense one, so that there is nothing to upcycle.
    assert done.returncode == (2 if action == "upcycle" else 0), done.stderr


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": ["own"], "auto_map": {}}', "[" * 100_000])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert cli.main(["checkpoint", "import", str(tmp_path)]) == 2
    assert str(tmp_path / "config.json") in capsys.readouterr().err


def test_a_hub_data_sets_script_is_not_run(tmp_path: Path, run_yaml: Path) -> None:
    script = tmp_path / "corpus" / "corpus.py"
    script.parent.mkdir()
    script.write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).write_text('it ran')\n", encoding="utf-8"
    )
    source = f"data.sources=[{{name: theirs, hub: {script.parent}}}]"
    done = answering_yes("prepare", str(run_yaml), source, f"data.cache_dir={tmp_path / 'cache'}")
    assert not (tmp_path / "mark").exists()
    assert done.returncode == 2, done.stderr
    assert "data.sources[theirs].hub" in done.stderr


DANGEROUS = {
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path", "dill.load", "joblib.load", "shelve.open"),
}
"""Calls that run what they read."""


def calls_of(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_call_of_ours_runs_what_it_reads() -> None:
    files = [*(REPOSITORY / "dsmoe").rglob("*.py"), *(REPOSITORY / "launch").rglob("*.py")]
    files += [REPOSITORY / "docker" / "entrypoint.py"]
    found = []
    for file in files:
        for name, call in calls_of(file):
            keys = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            risky = name in DANGEROUS or keys.get("shell", "False") != "False" or "allow_pickle" in keys
            if name == "torch.load" and keys.get("weights_only") != "True":
                # Results that our own ranks wrote a moment ago into a temporary folder of this process.
                risky = file.relative_to(REPOSITORY) != Path("dsmoe/runtime/spawn.py")
            # `**NO_CODE` is the one place that says trust_remote_code.
            if name.endswith("from_pretrained") or name.endswith(".load_tokenizer"):
                risky = not any(
                    keyword.arg is None and "NO_CODE" in ast.unparse(keyword.value) for keyword in call.keywords
                )
            if risky:
                found.append(f"{file.relative_to(REPOSITORY)}:{call.lineno}: {name}")
    assert found == []
