from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsmoe
from dsmoe.cli import main
from dsmoe.config import Config, UserError, load_config
from dsmoe.config.dump import json_schema
from dsmoe.plan import Plan
from tests.helpers.recipes import VALID, write


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    return str(write(tmp_path, VALID))


def test_check_says_ok_and_what_it_is(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config_path]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"{config_path}: ok\n"
        "tiny: world size 8 (2 nodes x 4 devices), 4 layers, top 2 of 8 experts\n"
        "8 devices x 2 sequences x 256 tokens x 2 accumulation steps = 8,192 tokens per step; "
        "100 steps = 819.2 K tokens\n"
    )
    assert err == ""


def test_check_of_a_dense_model(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["moe=null", "parallel.expert=1", "model.ffn_size=128"]
    assert main(["config", "check", config_path, *overrides]) == 0
    assert "\ntiny: world size 8 (2 nodes x 4 devices), 4 layers, dense\n" in capsys.readouterr().out


def test_check_knows_the_devices(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config_path, "cluster.device=h100"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: cluster.device ('h100') is not a known device; ")


def test_one_problem_is_one_line_on_stderr(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config_path, "moe.top_k=9"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: moe.top_k (9) must be at most moe.num_experts (8) (command line)\n"


def test_all_problems_come_at_once(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", config_path, "moe.top_kk=9", "train.seed=x"]) == 2
    assert capsys.readouterr().err == (
        f"error: 2 problems in {config_path}:\n"
        "  - moe.top_kk: unknown key; did you mean 'top_k'? (command line)\n"
        '  - train.seed: expected a whole number >= 0, got "x" (command line)\n'
    )


def test_plan_prints_text_or_json(config_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config_path, "moe.top_k=4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny: world size 8 (2 nodes x 4 devices), 4 layers, top 4 of 8 experts\nparameters: ")
    assert err == ""
    expected = Plan.from_config(load_config(config_path, ["moe.top_k=4"])).json()
    for order in (["moe.top_k=4", "--json"], ["--json", "moe.top_k=4"]):
        assert main(["plan", config_path, *order]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    with pytest.raises(SystemExit):
        main(["plan", config_path, "--json", "moe.top_k=4", "--jsn"])
    assert "unrecognized arguments: moe.top_k=4 --jsn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.top_k=9", "error: moe.top_k (9) must be at most moe.num_experts (8) (command line)\n"),
        ("cluster.device=h100", "error: cluster.device ('h100') is not a known device; "),
    ],
)
def test_plan_refuses_as_check_does(
    override: str, message: str, config_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config_path, override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_show_prints_what_loads_again(config_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", config_path, "moe.top_k=4"]) == 0
    shown = write(tmp_path, capsys.readouterr().out, "shown.yaml")
    assert load_config(shown) == load_config(config_path, ["moe.top_k=4"])
    assert yaml.safe_load(shown.read_text(encoding="utf-8"))["train"]["eval_every"] is None


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


@pytest.mark.parametrize(
    "arguments", [[], ["config"], ["config", "check"], ["nothing"], ["config", "schema", "x.yaml"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: dsmoe")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dsmoe {dsmoe.__version__}\n"


def fake_data(monkeypatch: pytest.MonkeyPatch, prepare: Any) -> None:
    module = types.ModuleType("dsmoe.data")
    module.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dsmoe.data", module)


def test_prepare_hands_over_the_config(
    config_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Config] = []
    fake_data(monkeypatch, lambda config: seen.append(config) or ["plays", "code"])
    assert main(["prepare", config_path, "data.cache_dir=there"]) == 0
    assert seen == [load_config(config_path, ["data.cache_dir=there"])]
    assert capsys.readouterr().out == "2 sources ready in there\n"


def test_prepare_reports_what_the_user_can_put_right(
    config_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(config: Config) -> None:
        raise UserError("data.sources.0.path (nope.txt): no such file")

    fake_data(monkeypatch, prepare)
    assert main(["prepare", config_path]) == 2
    assert capsys.readouterr().err == "error: data.sources.0.path (nope.txt): no such file\n"


def test_an_error_of_ours_is_not_taken_for_the_users(config_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(config: Config) -> None:
        raise ValueError("a bug")

    fake_data(monkeypatch, prepare)
    with pytest.raises(ValueError, match="a bug"):
        main(["prepare", config_path])


def test_the_module_runs_and_imports_neither_torch_nor_deepspeed(config_path: str) -> None:
    code = (
        "import sys; from dsmoe.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'pyarrow'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "config", "check", config_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, encoding="utf-8")
    assert result.stdout.splitlines()[-1] == "[]"


def test_python_m_dsmoe_exits_with_mains_code(config_path: str) -> None:
    command = [sys.executable, "-m", "dsmoe", "config", "check", config_path, "moe.top_k=9"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, encoding="utf-8")
    assert result.returncode == 2
    assert result.stderr.startswith("error: moe.top_k (9)")


# The schema


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"Config": schema, **schema["$defs"]}


def test_every_key_and_section_is_described() -> None:
    keys = 0
    for name, section in sections(json_schema()).items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key} has no docstring"
            keys += 1
    assert keys > 70


def test_include_is_in_the_schema_and_nothing_is_required_because_a_file_may_include_it() -> None:
    schema = json_schema()
    assert schema["properties"]["include"]["type"] == ["array", "string"]
    assert schema["properties"]["include"]["items"] == {"type": "string"}
    assert not [name for name, section in sections(schema).items() if "required" in section]


def test_making_the_schema_leaves_the_loader_strict(tmp_path: Path) -> None:
    json_schema()
    with pytest.raises(UserError, match="model: required section is missing"):
        load_config(write(tmp_path, VALID.replace("model:", "modle:")))
