"""A checkpoint of which any file is not what was written is refused, whatever has become of it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from dsmoe.checkpoint.folder import verify
from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.parallel.local import run_ranks
from tests import damage
from tests.checkpoint.test_crashes import save_small


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
    outcomes: dict[str, list[str]] = {"refused": [], "accepted": [], "other": []}
    for number in range(count):
        draw = random.Random(number)
        shutil.rmtree(checkpoint)
        shutil.copytree(whole, checkpoint)
        path, way = draw.choice(sorted(checkpoint.iterdir())), draw.choice(WAYS)
        way(path, draw)
        what = f"{number}: {way.__name__} {path.name}"
        try:
            verify(checkpoint)
            outcomes["accepted"].append(what)
        except DamagedError as error:
            is_clear = str(checkpoint) in str(error) and "\n" not in str(error) and len(str(error)) < 600
            outcomes["refused" if is_clear else "other"].append(f"{what}: {error}")
        except Exception as error:
            outcomes["other"].append(f"{what}: {error!r}")
    print({outcome: len(found) for outcome, found in outcomes.items()})
    assert outcomes["accepted"] == outcomes["other"] == []
    assert len(outcomes["refused"]) == count
