"""Where a checkpoint is wanted, the folder of a run stands for its newest one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.plan.plan import Plan
from dsmoe.train.run_folder import check_run_folder
from tests.helpers.hugging_face_models import MIXTRAL, make_config, save


def config_with(folder: Path, **checkpoint: Any) -> Config:
    return make_config(folder, MIXTRAL, checkpoint=checkpoint, runs_dir=str(folder / "runs"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(config_with(tmp_path), tmp_path / "old" / "checkpoints" / "step_00000000")
    (tmp_path / "old" / "checkpoints" / "step_00000007").mkdir()  # not whole
    return tmp_path / "old"


def test_a_runs_folder_is_its_newest_whole_checkpoint(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints" / "step_00000000"
    for path in (run, newest):
        assert check_run_folder(Plan.from_config(config_with(tmp_path, weights_from=str(path)))).weights == newest
        assert check_run_folder(Plan.from_config(config_with(tmp_path, resume=str(path)))).checkpoints == (newest,)


@pytest.mark.parametrize("key", ["weights_from", "resume"])
def test_a_run_without_a_whole_checkpoint_is_refused(key: str, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000000")
    with pytest.raises(
        UserError, match=rf"checkpoint\.{key} is the folder of a run, .*old, that has no whole .*step_00000007"
    ):
        check_run_folder(Plan.from_config(config_with(tmp_path, **{key: str(run)})))
