"""Each mistake of this folder fails the test that it names; without one, all of these tests pass."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mutations import mutations, ranks, starts, stored
from tests.mutations.mutation import Mutation

REPOSITORY = Path(__file__).parents[2]
MUTATIONS = [*mutations.MUTATIONS, *ranks.MUTATIONS, *starts.MUTATIONS, *stored.MUTATIONS]


def copy_package(folder: Path) -> None:
    for name in ("dsmoe", "tests", "launch"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)


def run_tests(tests: Iterable[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of the tests of the copy; its ranks import the copy too."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


def test_every_mutation_can_be_made_and_names_a_test() -> None:
    for mutation in MUTATIONS:
        text = (REPOSITORY / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.mistake}: {mutation.file} has to have once: {mutation.old}"
        ast.parse(text.replace(mutation.old, mutation.new))
        file, *_, name = mutation.caught_by.partition("[")[0].split("::")
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), (
            f"{mutation.mistake}: {mutation.caught_by}"
        )


@pytest.mark.mutations
@pytest.mark.timeout(1200)
def test_without_a_mistake_all_of_them_pass(tmp_path: Path) -> None:
    copy_package(tmp_path)
    status, output = run_tests(sorted({mutation.caught_by for mutation in MUTATIONS}), tmp_path)
    assert status == 0, output


@pytest.mark.mutations
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mistake)
def test_a_mistake_is_seen(mutation: Mutation, tmp_path: Path) -> None:
    copy_package(tmp_path)
    file = tmp_path / mutation.file
    file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    status, output = run_tests([mutation.caught_by], tmp_path)
    assert status == 1, f"{mutation.caught_by} should have failed:\n{output}"
    assert re.search(mutation.shown_by, output, re.MULTILINE), (
        f"{mutation.caught_by} failed for another reason:\n{output}"
    )
