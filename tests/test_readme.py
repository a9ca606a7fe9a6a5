"""The README and the pages that continue it: commands parse and run, configs load, numbers are counted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dsmoe import cli, load_config
from dsmoe.parity import check_parity
from dsmoe.parity.training import Training
from dsmoe.plan import Topology, count_parameters
from dsmoe.plan.text import readable_count

REPOSITORY = Path(__file__).parents[1]
PAGES = ("docs/configuration.md", "docs/layouts.md", "docs/testing.md")
README, *CONTINUED = [(REPOSITORY / page).read_text(encoding="utf-8") for page in ("README.md", *PAGES)]


def blocks(language: str, *pages: str) -> list[str]:
    """The fenced blocks of `pages`; without any, of the README and all pages that continue it."""
    text = "\n".join(pages or (README, *CONTINUED))
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
TRAINING = [line for line in COMMANDS if "launch/pretrain.py" in line]
DSMOE = [line for line in COMMANDS if line.startswith("dsmoe ")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_commands_are_found() -> None:
    assert len(TRAINING) >= 4
    assert len(DSMOE) >= 4
    assert len(MAKE) >= 4


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_names_a_launcher_script_and_config_that_exist(command: str) -> None:
    words = shlex.split(command)
    assert words[0] in ("deepspeed", "torchrun", "python")
    script = words.index("launch/pretrain.py")
    assert Path(words[script]).is_file()
    assert words[script + 1] == "--config"
    load_config(words[script + 2], words[script + 3 :])


@pytest.mark.parametrize("command", DSMOE)
def test_a_dsmoe_command_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.split(">")[0])[1:]
    if words[0] == "prepare":  # its corpus is the reader's
        load_config(words[1], words[2:])
        return
    assert cli.main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", MAKE)
def test_a_make_target_exists(command: str) -> None:
    environment = {**os.environ, "MAKEFLAGS": ""}
    subprocess.run([*shlex.split(command), "--dry-run"], check=True, capture_output=True, env=environment)


@pytest.mark.parametrize("text", blocks("python"))
def test_a_python_block_runs(text: str) -> None:
    """In a process of its own: one of them joins a process group."""
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_yaml_block_loads(text: str, tmp_path: Path) -> None:
    """A whole config as it stands, a fragment on top of the recipe for one node."""
    if "include:" not in text:
        text = f"name: fragment\ninclude: [configs/small_8gpu.yaml]\n{text}"
    path = tmp_path / "block.yaml"
    path.write_text(text.replace("configs/", f"{REPOSITORY}/configs/"), encoding="utf-8")
    load_config(path)


def test_the_wrong_command_is_answered_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = [block for block in blocks("text") if block.startswith("$ dsmoe config check")]
    command, _, answer = shown.partition("\n")
    assert cli.main(shlex.split(command)[2:]) == 2
    assert capsys.readouterr().err == answer


def test_the_plan_is_printed_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = [block for block in blocks("text", *CONTINUED) if block.startswith("$ dsmoe plan")]
    command, _, answer = shown.partition("\n")
    assert cli.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out == answer


def test_the_parts_of_the_plan_in_the_readme_are_parts_of_the_whole() -> None:
    (part,) = [block for block in blocks("text", README) if block.startswith("$ dsmoe plan")]
    (whole,) = [block for block in blocks("text", *CONTINUED) if block.startswith("$ dsmoe plan")]
    *parts, after = part.split("...\n")
    assert len(parts) > 1
    assert after == ""
    assert whole.startswith(parts[0])
    for former, latter in pairwise(parts):
        assert f"\n{latter}" in whole[whole.index(former) + len(former) :]


def test_the_comparison_of_layouts_is_introduced_as_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the training: tests/parity/test_check_parity.py has that."""
    (shown,) = [block for block in blocks("text") if block.startswith("$ dsmoe parity")]
    command, _, answer = shown.partition("\n")
    words = shlex.split(command)[2:]
    trained: list[int] = []
    training = Training([1.0], [1.0], 1.0, {"w": torch.ones(1)}, apart=0.0, travelled=0.0015)

    def train(ranks: int, *_: object, timeout: float) -> list[Training]:
        trained.append(ranks)
        return [training] * ranks

    monkeypatch.setattr(check_parity, "run_ranks", train)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    expected = answer.splitlines()
    assert (printed[0], printed[-2:]) == (expected[0], expected[-2:])
    assert trained == [int(row.split()[1]) for row in expected[2:-2]]
    assert [line.split()[0] for line in printed] == [line.split()[0] for line in expected]


def test_the_table_of_recipes_is_what_the_configs_say() -> None:
    rows = re.findall(r"^\| `(configs/\w+\.yaml)` \| (.*?) \| (.*?) \| (\d+) x (\d+) (\S+) \| (\d+) \|$", README, re.M)
    assert {Path(name) for name, *_ in rows} == {
        path.relative_to(REPOSITORY) for path in REPOSITORY.glob("configs/*.yaml")
    }
    for name, total, active, nodes, devices, device, expert in rows:
        config = load_config(name)
        counts, topology = count_parameters(config), Topology.from_config(config)
        assert (total, active) == (readable_count(counts.total), readable_count(counts.active))
        assert (int(nodes), int(devices), int(expert)) == (topology.nodes, topology.devices_per_node, topology.expert)
        assert device == config.cluster.device


def test_the_shown_run_is_the_recipe_that_make_train_runs() -> None:
    (shown,) = [block for block in blocks("text", README) if "run tiny_cpu" in block]
    config = load_config("configs/tiny_cpu.yaml")
    counts = count_parameters(config)
    assert f"parameters: {counts.total:,} total, {counts.active:,} active" in shown
    assert f"step {config.train.steps}/{config.train.steps} 100.0%" in shown


def test_the_picture_is_of_the_shown_run() -> None:
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    drawn = {text.text for text in ElementTree.parse(REPOSITORY / picture).iter("{http://www.w3.org/2000/svg}text")}
    (shown,) = [block for block in blocks("text", README) if "run tiny_cpu" in block]
    (bigram,) = re.findall(r"^a bigram model .* reaches ([\d.]+) bits/byte", shown, re.MULTILINE)
    *_, reached = re.findall(r"^eval \d+ loss .* bits/byte ([\d.]+)", shown, re.MULTILINE)
    assert {f"bigram model {bigram}", reached} <= drawn
