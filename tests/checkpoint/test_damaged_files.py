"""A checkpoint of which any file is not what was written is refused, whatever has become of it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from dsmoe.checkpoint.folder import verify
from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.runtime.spawn import run_ranks
from tests.checkpoint.test_crashes import save_small
from tests.helpers import damage


def save_two(folder: Path) -> None:
    for step in (1, 2):
        save_small(folder, step)


def exchange_with_another(path: Path, draw: random.Random) -> None:
    """One of the same name, of another checkpoint."""
    other = path.parent.with_name("step_00000001") / path.name
    path.write_bytes(other.read_bytes())


WAYS = [*damage.WAYS, exchange_with_another]


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.fuzz)])
@pytest.mark.timeout(1800)
def test_every_damage_is_refused(count: int, tmp_path: Path) -> None:
    """Seeded; with one line that names the checkpoint."""
    run_ranks(1, save_two, tmp_path)
    whole, checkpoint = tmp_path / "whole", tmp_path / "step_00000002"
    verify(checkpoint)
    shutil.copytree(checkpoint, whole)

    def spoil(draw: random.Random) -> tuple[str, str]:
        shutil.rmtree(checkpoint)
        shutil.copytree(whole, checkpoint)
        path, way = draw.choice(sorted(checkpoint.iterdir())), draw.choice(WAYS)
        way(path, draw)
        return f"{way.__name__} {path.name}", str(checkpoint)

    def is_clear(said: str) -> bool:
        return "\n" not in said and len(said) < 600

    outcomes = damage.outcomes_of(count, spoil, lambda: verify(checkpoint), DamagedError, is_clear)
    assert outcomes["accepted"] == outcomes["other"] == []
    assert len(outcomes["refused"]) == count
