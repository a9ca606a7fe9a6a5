"""`dsmoe checkpoint show` and `verify`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.cli import main
from dsmoe.config import dump_config
from dsmoe.config.schema import Config
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.checkpoint_runs import folder_of, layout_config, save_between


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """That of a run with one checkpoint."""
    config = layout_config(tmp_path_factory.mktemp("show"), 2, expert=2)
    run_ranks(2, save_between, config, 1, 0)
    return config


def test_what_is_inside(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder_of(config) / "step_00000001"
    assert main(["checkpoint", "show", str(checkpoint.parents[1]), "--tensors"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == str(checkpoint)
    assert lines[1] == "step 1, 256 tokens, 0 skipped steps"
    assert "ranks 2, tensor 1, expert 2, expert_tensor 1" in lines[2]
    size = sum(path.stat().st_size for path in checkpoint.glob("rank_*"))
    assert lines[4] == f"2 files, {size / 1e6:.2f} MB"
    assert "weights (model, F32)" in out
    (row,) = (line.split() for line in lines if line.startswith("exp_avg/blocks.1.ffn.deepspeed_moe.experts.gate_up"))
    assert row[1:] == ["F32", "4x64x32", "2"]


def test_what_differs_from_a_config_or_a_checkpoint(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(folder_of(config) / "step_00000001")
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 0.5})})
    (tmp_path / "other.yaml").write_text(dump_config(other), encoding="utf-8")
    assert main(["checkpoint", "show", checkpoint, "--against", str(tmp_path / "other.yaml")]) == 0
    assert "optimizer.lr  0.003          0.5" in capsys.readouterr().out
    assert main(["checkpoint", "show", checkpoint, "--against", checkpoint]) == 0
    assert "the same config" in capsys.readouterr().out
    assert main(["checkpoint", "show", checkpoint, "--against", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().out == "", "nothing but the error"


def test_verify_says_whole_or_names_the_file(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder_of(config) / "step_00000001"
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert "is whole: 2 files" in capsys.readouterr().out
    path = checkpoint / "rank_00001_000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    assert main(["checkpoint", "verify", str(checkpoint)]) == 2
    assert f"error: {path} is damaged" in capsys.readouterr().err
    path.write_bytes(content[:-1])
    run, next_one = str(checkpoint.parents[1]), checkpoint.with_name("step_00000002")
    assert main(["checkpoint", "verify", run]) == 2
    assert f"error: {path} has {len(content) - 1:,} bytes" in capsys.readouterr().err
    path.write_bytes(content)
    next_one.mkdir()
    assert main(["checkpoint", "verify", run]) == 2, "the newest one is meant, whole or not"
    assert main(["checkpoint", "show", run]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == str(checkpoint)
    assert f"{next_one} is not a whole checkpoint" in shown.err
    next_one.rmdir()
    assert main(["checkpoint", "verify", str(checkpoint / "nothing")]) == 2
    assert "is neither a checkpoint nor a folder with whole ones" in capsys.readouterr().err
    assert main(["checkpoint", "verify", "x" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--shard-gb=nan", "--shard-gb=inf", "--shard-gb=0", "--shard-gb=-1"])
def test_sizes_of_files_are_numbers_above_0(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", "somewhere", "there", option])
    assert "is not a number above 0" in capsys.readouterr().err


def test_neither_needs_torch() -> None:
    program = "import sys; import dsmoe.checkpoint.inspection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
