"""A job is queued again for as long as it gets further, or is told to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.launch import attempts
from dsmoe.launch.attempts import MOST_FAILURES, should_requeue, steps_taken

REPOSITORY = Path(__file__).parents[2]


def train_to(folder: Path, step: int, skipped: int = 0, every: int = 10) -> None:
    """Metrics to that step, and a checkpoint now and then."""
    (folder / "checkpoints" / f"step_{step // every * every:08d}").mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "eval/loss": 8.0}, {"step": step, "train/loss": 1.0, "optim/skipped_steps": skipped}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def fail(folder: Path, job: str = "1") -> bool:
    return should_requeue(folder, 1, job)[0]


STOPS = [75, 128 + 10, 128 + 15]


@pytest.mark.parametrize("code", [0, 2])
def test_what_ends_the_job_is_not_counted(code: int, tmp_path: Path) -> None:
    for _ in range(2 * MOST_FAILURES):
        assert not should_requeue(tmp_path, code, "1")[0]
    assert fail(tmp_path)


@pytest.mark.parametrize("code", STOPS)
def test_being_told_to_stop_is_no_failure_while_checkpoints_follow_each_other(code: int, tmp_path: Path) -> None:
    for step in range(2 * MOST_FAILURES):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        assert should_requeue(tmp_path, code, "1")[0]
    assert fail(tmp_path)


@pytest.mark.parametrize("code", STOPS)
def test_being_told_to_stop_before_there_is_a_step_to_save_has_an_end(code: int, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)  # of an earlier job
    (tmp_path / "checkpoints" / "step_00000020.partial").mkdir()
    answers = [should_requeue(tmp_path, code, "1") for _ in range(1 + MOST_FAILURES)]
    assert [again for again, _ in answers] == [True, True, True, False]
    assert "before they had a step to save, and none is made again. Give it more time (--time)" in answers[-1][1]


@pytest.mark.parametrize("code", [1, 127, 134, 137])
def test_three_failures_at_one_step_are_the_end(code: int, tmp_path: Path) -> None:
    train_to(tmp_path, 100)
    answers = [should_requeue(tmp_path, code, "1") for _ in range(MOST_FAILURES)]
    assert [again for again, _ in answers] == [True, True, False]
    assert f"exit code {code}: failure 3 of 3 (steps done: 100)" in answers[-1][1]


def test_progress_is_further_than_ever_before(tmp_path: Path) -> None:
    reached = [100, 90, 110, 110, 60, 105]
    answers = []
    for step in reached:
        train_to(tmp_path, step)
        answers.append(fail(tmp_path))
    assert answers == [True, True, True, True, False, False]


def test_steps_that_are_lost_each_time_are_no_progress(tmp_path: Path) -> None:
    answers = []
    for step in (1490, 1510, 1530, 2010):
        train_to(tmp_path, step, every=1000)
        answers.append(fail(tmp_path))
    assert answers == [True, True, False, True]


def test_being_told_to_stop_in_between_is_no_progress(tmp_path: Path) -> None:
    answers = []
    for _ in range(MOST_FAILURES):
        answers.append(fail(tmp_path))
        should_requeue(tmp_path, 75, "1")
    assert answers == [True, True, False]


def test_a_run_that_only_skips_steps_gets_nowhere(tmp_path: Path) -> None:
    answers = []
    for step in (40, 60, 80):
        train_to(tmp_path, step, skipped=step - 20)
        answers.append(fail(tmp_path))
    assert answers == [True, True, False]


def test_a_job_that_is_submitted_anew_begins_anew(tmp_path: Path) -> None:
    assert [fail(tmp_path, job) for job in ("1", "1", "2", "2", "2")] == [True, True, True, True, False]


@pytest.mark.parametrize("tail", ["", '{"step": 12', '{"step": 9, "eval/loss": 1.0}\n', "[1]\n", "\n"])
def test_the_last_step_is_read_whatever_ends_the_file(tail: str, tmp_path: Path) -> None:
    assert steps_taken(tmp_path) == 0
    train_to(tmp_path, 9)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(tail)
    assert steps_taken(tmp_path) == 9


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 30_001):
            file.write(json.dumps({"step": step, "optim/skipped_steps": 0.0, "filling": "x" * 60}) + "\n")
    assert file.closed
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2 << 20
    assert steps_taken(tmp_path) == 30_000


@pytest.mark.parametrize("text", ['{"job": "1"', '{"job": "1", "failures": Infinity, "steps_done": 1}', "[]", "\xff"])
def test_a_damaged_count_is_no_count(text: str, tmp_path: Path) -> None:
    (tmp_path / "attempts.json").write_text(text, encoding="latin-1")
    assert [fail(tmp_path) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(("restarts", "again"), [(None, True), ("2", True), ("3", False), ("many", False)])
def test_what_cannot_be_counted_is_tried_again_while_slurm_has_not_often(
    restarts: str | None,
    again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "attempts.json").mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(sys, "argv", ["attempts", str(tmp_path), "1"])
    assert attempts.main() == (0 if again else 1)
    assert f"exit code 1, and {tmp_path}/attempts.json: Is a directory; " in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["folder", "damaged", "missing", "empty"])
def test_metrics_that_cannot_be_read_do_not_count_against_a_run_that_saves(harm: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if harm == "folder":
        metrics.mkdir()
    elif harm != "missing":
        metrics.write_bytes(b"" if harm == "empty" else b"\xff\xfe" * 50 + b"\n" + b"[" * 5000)
    answers = []
    for step in range(1, 6):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        answers.append(fail(tmp_path))
    assert answers == [True] * 5
    assert [fail(tmp_path), fail(tmp_path)] == [True, False]


def test_the_command_needs_nothing_but_python(tmp_path: Path) -> None:
    """`-S`: without any installed package."""
    command = [sys.executable, "-S", "-m", "dsmoe.launch.attempts", str(tmp_path)]
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    for code, returned, says in ((75, 0, "told to stop"), (2, 1, "put right"), (1, 0, "failure 1 of 3")):
        done = subprocess.run(
            [*command, str(code)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
        )
        assert (done.returncode, done.stderr) == (returned, "")
        assert says in done.stdout
