"""The run folder: locked before it is looked at, and no report, config file or storage that hiccups decides a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe.checkpoint.folder import all_checkpoints, verify
from dsmoe.checkpoint.manifest import MANIFEST, _sealed
from dsmoe.cli import main as cli
from dsmoe.config import UserError, load_config
from dsmoe.config.errors import PassingError, exit_code_of
from dsmoe.data import prepare
from dsmoe.plan.plan import Plan
from dsmoe.runtime.processes import HostError
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train import run_folder as run_folders
from dsmoe.train.run_folder import check_run_folder, claim_run_folder, make_run_folder, set_later_aside
from dsmoe.train.summary import summary
from tests.checkpoint.test_crashes import save_small
from tests.helpers.checkpoint_runs import layout_config
from tests.helpers.crashes import figures
from tests.helpers.forked import Outcome, start_on_ranks
from tests.train.test_run import pretrain, refused, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and the run of four steps that it describes."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"train": {"steps": 4}, "checkpoint": {"every": 1, "keep": 3}, "observe": {"tensorboard": True}}
    config = write_config(folder, runs_dir="runs", **options)
    outcome = pretrain(folder, "--config", str(config))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be harmed."""
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    return tmp_path / "work"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def start(work: Path, *overrides: str) -> Outcome:
    return pretrain(work, "--config", "config.yaml", *overrides)


# ---- the lock comes first


def test_a_start_beside_a_run_reads_and_renames_nothing(work: Path) -> None:
    run = work / "runs" / "small"
    for checkpoint in all_checkpoints(run / "checkpoints"):
        (checkpoint / "manifest.json").rename(checkpoint / "elsewhere.json")  # as when the run writes or removes it
    before = names(run)
    with (run / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = start(work)
    assert second.code == 1
    assert second.err.startswith("error: another process is training in runs/small")
    assert names(run) == before


MEANWHILE = """
import os, shutil, sys
from pathlib import Path
from dsmoe.train import run
prepare_data = run.prepare_data
def meanwhile(config):
    sources = prepare_data(config)
    here = Path("runs/small/checkpoints")
    for step in (2, 3):
        shutil.rmtree(here / f"step_{step:08d}")
    os.rename("newer", here / "step_00000004")
    return sources
run.prepare_data = meanwhile
os._exit(run.main())
"""


def test_what_another_run_did_while_the_data_were_prepared_is_seen(work: Path) -> None:
    """It read its list of checkpoints before: those that were gone since, it took for damaged, with what had come."""
    checkpoints = work / "runs" / "small" / "checkpoints"
    (checkpoints / "step_00000004").rename(work / "newer")
    (work / "meanwhile.py").write_text(MEANWHILE, encoding="utf-8")
    outcome = start_on_ranks(1, work, "--config", "config.yaml", "train.steps=5", script=work / "meanwhile.py")
    assert outcome.code == 0, outcome.err
    assert "continuing from runs/small/checkpoints/step_00000004" in outcome.out
    assert "passed over" not in outcome.out
    assert names(work / "runs" / "small") == ["step_00000004", "step_00000005"]


def test_only_what_is_known_to_be_damaged_is_set_aside(tmp_path: Path) -> None:
    run_ranks(1, save_four, tmp_path)
    three, four = tmp_path / "step_00000003", tmp_path / "step_00000004"
    with pytest.raises(PassingError, match="step_00000004 is later than step 2"):
        set_later_aside(tmp_path, 2, [three])
    assert len(all_checkpoints(tmp_path)) == 4
    assert set_later_aside(tmp_path, 2, [three, four]) == [
        tmp_path / "step_00000003.damaged",
        tmp_path / "step_00000004.damaged",
    ]


def save_four(folder: Path) -> None:
    for step in (1, 2, 3, 4):
        save_small(folder, step, keep=4)


def test_a_lock_is_taken_once_by_a_process_and_again_when_the_folder_is_another(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    claim_run_folder(Plan.from_config(config))
    assert not Path(config.runs_dir).exists(), "nothing is made for a run that may be refused"
    make_run_folder(Plan.from_config(config), [])
    make_run_folder(Plan.from_config(config), [])
    claim_run_folder(Plan.from_config(config))
    lock = run_folders.run_folder(config) / ".lock"
    with lock.open("w", encoding="utf-8") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shutil.rmtree(config.runs_dir)
    make_run_folder(Plan.from_config(config), [])
    with lock.open("w", encoding="utf-8") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- storage that does not answer


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, number: int, often: int, of: str = "step_00000004/manifest.json"
) -> list[int]:
    """Lets reading a file fail so often; how often it may still."""
    left, read = [often], Path.read_text

    def failing(path: Path, *arguments: Any, **options: Any) -> str:
        if str(path).endswith(of):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(number, os.strerror(number), str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", failing)
    monkeypatch.setattr(run_folders, "LOOKS", (0.01, 0.01))
    return left


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_read_that_fails_for_a_moment_is_no_damage(number: int, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    config = load_config("config.yaml")
    left = failing_reads(monkeypatch, number, 2)
    beginning = check_run_folder(Plan.from_config(config))
    assert left[0] < 0
    assert beginning.checkpoints[0].name == "step_00000004"
    assert not beginning.damaged
    assert not beginning.passed_over


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, 1), (errno.EIO, 1), (errno.EACCES, 2)])
def test_a_newest_checkpoint_that_cannot_be_read_is_not_gone_back_behind(
    number: int, code: int, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    config = load_config("config.yaml")
    failing_reads(monkeypatch, number, 99)
    before = names(work / "runs" / "small")
    with pytest.raises(UserError, match="It may be whole, and is newer than all that can be read") as error:
        check_run_folder(Plan.from_config(config))
    assert exit_code_of(error.value) == code
    assert names(work / "runs" / "small") == before


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    config = load_config("config.yaml")

    def failing(path: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(os, "scandir", failing)
    monkeypatch.setattr(run_folders, "LOOKS", (0.01,))
    with pytest.raises(PassingError, match="Stale file handle"):
        check_run_folder(Plan.from_config(config))


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "link"])
def test_checkpoints_that_are_no_folder_are_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    folder = run_folders.run_folder(config)
    folder.mkdir(parents=True)
    make(folder / "checkpoints")
    with pytest.raises(UserError, match="is to be a folder of checkpoints"):
        check_run_folder(Plan.from_config(config))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("wrong"), 2),
        (PassingError("held"), 1),
        (HostError("here"), 1),
        (PermissionError(errno.EACCES, "no", "file"), 2),
        (FileNotFoundError(errno.ENOENT, "no", "file"), 2),
        (OSError(errno.EINVAL, "of a library's own"), 1),
        (OSError(errno.ENOSPC, "full", "file"), 1),
        (OSError(errno.EMFILE, "too many", "file"), 1),
        (OSError(errno.ESTALE, "stale", "file"), 1),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 1),
        (TimeoutError("slow"), 1),
        (RuntimeError("anything"), 1),
    ],
)
def test_two_is_for_what_a_person_must_change(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code


# ---- config.yaml


@pytest.mark.parametrize(
    "harm",
    [b"", b"\0" * 300, b"name: [a", b"\xff\xfe", b"moe: {num_expert: 3}\n"],
    ids=["empty", "zeros", "cut", "bytes", "old"],
)
def test_an_intact_run_goes_on_whatever_became_of_its_config(harm: bytes, work: Path) -> None:
    run = work / "runs" / "small"
    whole = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(harm)
    refused(start(work, "moe.top_k=1", "moe.router.normalize_weights=false"), "moe.top_k is 2 there and 1 here")
    assert (run / "config.yaml").read_bytes() == harm
    outcome = start(work, "train.steps=5")
    assert outcome.code == 0, outcome.err
    assert "runs/small/config.yaml cannot be used" in outcome.out
    assert "the config in runs/small/checkpoints/step_00000004 is compared instead" in outcome.out
    assert "continuing from runs/small/checkpoints/step_00000004" in outcome.out
    assert (run / "config.yaml").read_bytes() == whole.replace(b"steps: 4", b"steps: 5")


def test_without_a_checkpoint_a_damaged_config_is_written_anew(tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    folder = run_folders.run_folder(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    beginning, _ = make_run_folder(Plan.from_config(config), [])
    assert beginning.checkpoints == ()
    assert "there is no checkpoint: the run begins with the config given" in beginning.notes[0]
    assert load_config(folder / "config.yaml") == config


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.yaml", ".contents.json", "metrics.jsonl", "train.log", "environment.json"])
def test_a_pipe_in_the_place_of_a_runs_file_is_named(name: str, tmp_path: Path) -> None:
    config = layout_config(tmp_path)
    folder = run_folders.run_folder(config)
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name} is a pipe, not a file; move it away"):
        claim_run_folder(Plan.from_config(config))


# ---- reports


def test_training_needs_none_of_its_reports(tmp_path: Path) -> None:
    """Something else has every name that reports are written under."""
    options = {"train": {"steps": 3}, "checkpoint": {"every": 1}, "observe": {"tensorboard": True}}
    write_config(tmp_path, runs_dir="runs", **options)
    run = tmp_path / "runs" / "small"
    for name in ("metrics.jsonl", "train.log", "environment.json", "ds_config.json"):
        (run / name / "taken").mkdir(parents=True)
    for name in ("tensorboard", "failures"):
        (run / name).touch()
    outcome = start(tmp_path)
    assert outcome.code == 0, outcome.err
    for what in ("train.log", "environment.json", "metrics.jsonl", "tensorboard"):
        assert f"no {what} (" in outcome.out
    assert "reports of failures go to" in outcome.out
    assert "step 3/3" in outcome.out
    assert "what to run next" in outcome.out
    verify(run / "checkpoints" / "step_00000003")
    assert "Traceback" not in outcome.out + outcome.err


HARMS: dict[str, bytes] = {
    "a bad byte": b'{"step": 2, "eval/bits_per_byte": "\xff"}\n',
    "deep nesting": b"[" * 100_000 + b"\n",
    "a huge number": b'{"step": ' + b"9" * 400 + b', "eval/bits_per_byte": ' + b"9" * 400 + b"}\n",
    "more digits than Python reads": b'{"step": ' + b"9" * 5000 + b"}\n",
    "zeros": b"\0" * 4096 + b"\n",
    "an evaluation of nothing": b'{"step": 1, "eval/bits_per_byte": null}\n{"step": 1, "eval/bits_per_byte": NaN}\n',
    "an evaluation without a step": b'{"eval/bits_per_byte": 2.0}\n',
    "cut off": b'{"step": 3, "eval/bits',
    "carriage returns": b"\r\r\n",
}


def test_whatever_is_in_the_metrics_a_run_goes_on_and_says_its_result(work: Path) -> None:
    metrics = work / "runs" / "small" / "metrics.jsonl"
    undisturbed = figures(metrics.parent)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(
        b"".join(lines[:2])
        + b"".join(HARMS[kind] for kind in HARMS if kind != "cut off")
        + b"".join(lines[2:])
        + HARMS["cut off"]
    )
    outcome = start(work, "train.steps=5")
    assert outcome.code == 0, outcome.err
    assert "lines that are no metrics are left out" in outcome.out
    assert "held-out bits per byte" in outcome.out
    assert figures(metrics.parent)[:4] == undisturbed
    assert [step for step, _, _ in figures(metrics.parent)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [*HARMS, "no file", "nothing", "a folder"])
def test_a_summary_is_made_of_what_there_is(kind: str, work: Path) -> None:
    run = work / "runs" / "small"
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    plan = Plan.from_config(load_config(work / "config.yaml"))
    metrics.unlink()
    if kind == "a folder":
        metrics.mkdir()
    elif kind != "no file":
        metrics.write_bytes(HARMS.get(kind, b""))
    text = summary(run, {"eval/bits_per_byte": 3.0}, plan)
    assert text.startswith("what to run next")
    if kind in HARMS:
        metrics.write_bytes(HARMS[kind].rstrip(b"\n") + b"\n" + whole)
        assert summary(run, None, plan).startswith("held-out bits per byte")
        assert "than the bigram model" in summary(run, {"eval/bits_per_byte": 3.0}, plan)


def evaluations(run: Path, *found: tuple[int, float, object]) -> None:
    """Write a `metrics.jsonl` of (step, bits per byte, text); without a text where that is None."""
    lines = [{"step": step, "eval/bits_per_byte": bits, "eval/held_out": text} for step, bits, text in found]
    kept = [{key: value for key, value in line.items() if value is not None} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def test_a_summary_compares_evaluations_of_one_text(work: Path) -> None:
    run, bigram = work / "runs/small", {"eval/bits_per_byte": 3.0}
    plan = Plan.from_config(load_config(work / "config.yaml"))
    few, many = {"web": "8 sequences"}, {"web": "16 sequences"}
    evaluations(run, (0, 8.0, few), (2, 6.0, few), (3, 5.0, many), (4, 4.0, many))
    text = summary(run, bigram, plan, many)
    assert re.search(r"source +step 3 +step 4 +bigram model\n +all +5.000 +4.000 +3.000\n", text)
    assert "left out, as of other text: 2 evaluations of steps 0 to 2 (web: 8 sequences -> 16 sequences)" in text
    assert "1.00 bits per byte worse than the bigram model" in text
    evaluations(run, (0, 8.0, few), (4, 4.0, many))
    assert re.search(
        r"source +step 4 +bigram model\n +all +4.000 +3.000\nleft out, as of other text: step 0",
        summary(run, bigram, plan),
    )
    evaluations(run, (0, 8.0, many), (4, 4.0, many))
    text = summary(run, bigram, plan, few)
    assert re.search(r"source +step 0 +step 4 +bigram model\n +all +8.000 +4.000 +-\nno bigram model: ", text)
    assert "than the bigram" not in text
    evaluations(run, (0, 8.0, None), (4, 4.0, many))
    assert "left out, as of other text: step 0 (not every one says of which)" in summary(run, bigram, plan)
    for odd in ([[]], "x", 3, {"web": [{}]}, {"books": {}}):
        evaluations(run, (0, 8.0, odd), (4, 4.0, many))
        assert "left out" in summary(run, bigram, plan)
        evaluations(run, (0, 8.0, many), (4, 4.0, odd))
        assert "left out" in summary(run, bigram, plan)


def test_a_run_that_evaluates_other_text_names_the_key_and_compares_nothing(work: Path) -> None:
    outcome = start(work, "train.steps=6", "train.eval_sequences=2")
    assert outcome.code == 0, outcome.err
    assert "changed since the run was last started: train.eval_sequences, " in outcome.out
    assert "what is evaluated is not what it was when runs/small/checkpoints/step_00000004 was made (train.eval_s" in (
        outcome.out
    )
    assert re.search(r"\n  source  +step 6  +bigram model\n", outcome.out)
    assert "left out, as of other text: 2 evaluations of steps 0 to 4 (" in outcome.out
    again = start(work, "train.steps=6", "train.eval_sequences=4")
    assert "no bigram model: it is of the text of this start, and step 6 is not" in again.out, again.err


LOSING = """
import os, shutil, sys
from pathlib import Path
from dsmoe.train import run, Trainer
step = Trainer.step
def losing(self):
    if self.step_index == 2:
        for path in Path("runs/small").iterdir():
            if path.name not in ("checkpoints", ".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return step(self)
def broken(*_):
    raise MemoryError("too large a vocabulary")
Trainer.step, run.evaluate_bigram_model = losing, broken
os._exit(run.main())
"""


def test_reports_that_are_removed_while_it_trains_do_not_end_a_run(tmp_path: Path) -> None:
    options = {"train": {"steps": 5}, "checkpoint": {"every": 2}, "observe": {"tensorboard": True}}
    write_config(tmp_path, runs_dir="runs", **options)
    (tmp_path / "losing.py").write_text(LOSING, encoding="utf-8")
    outcome = start_on_ranks(1, tmp_path, "--config", "config.yaml", script=tmp_path / "losing.py")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs" / "small"
    verify(run / "checkpoints" / "step_00000005")
    assert "no bigram model (MemoryError('too large a vocabulary')); training goes on without" in outcome.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 4, 5], "written on in a new file"
    assert "step 5/5" in (run / "train.log").read_text(encoding="utf-8")
    assert not (run / "failures").exists()


# ---- what messages advise


def test_the_advice_for_a_folder_of_another_config_works(work: Path) -> None:
    outcome = start(work, "optimizer.weight_decay=0.2", "train.steps=6")
    refused(outcome, "optimizer.weight_decay is 0.1 there and 0.2 here")
    assert "remove" not in outcome.err
    (advice,) = re.findall(r"give this run another name: (name=\S+ checkpoint\.resume=\S+) goes on", outcome.err)
    onward = start(work, "optimizer.weight_decay=0.2", "train.steps=6", *shlex.split(advice))
    assert onward.code == 0, onward.err
    assert "continuing from runs/small/checkpoints/step_00000004" in onward.out
    other = start(work, "moe.top_k=1", "moe.router.normalize_weights=false")
    refused(other, "moe.top_k is 2 there and 1 here")
    (advice,) = re.findall(r"give this run another name \((name=\S+)\)", other.err)
    anew = start(work, "moe.top_k=1", "moe.router.normalize_weights=false", advice)
    assert anew.code == 0, anew.err
    assert "run small-3 in" in anew.out


def test_the_advice_to_go_back_or_to_go_on_works(work: Path) -> None:
    earlier = "checkpoint.resume=runs/small/checkpoints/step_00000002"
    outcome = start(work, earlier)
    refused(outcome, "this run has a later one, runs/small/checkpoints/step_00000004")
    (paths,) = re.findall(r"To go back, remove (.+); or give", outcome.err)
    (name,) = re.findall(r"another name \((name=\S+)\)", outcome.err)
    fork = start(work, earlier, name)
    assert fork.code == 0, fork.err
    assert "continuing from runs/small/checkpoints/step_00000002" in fork.out
    past = start(work, "train.steps=3")
    refused(past, "step_00000004 is past this config's last step, 3")
    (longer,) = re.findall(r"set (train\.steps=\d+) or more", past.err)
    assert start(work, longer).code == 0
    for path in shlex.split(paths):
        shutil.rmtree(work / path)
    back = start(work, earlier)
    assert back.code == 0, back.err
    assert "continuing from runs/small/checkpoints/step_00000002" in back.out


def test_the_advice_for_other_steps_works(work: Path) -> None:
    outcome = start(work, "train.batch_tokens=512")
    refused(outcome, "train.batch_tokens is 256 there and 512 here")
    (advice,) = re.findall(r"(name=\S+ checkpoint\.weights_from=\S+) begins with", outcome.err)
    onward = start(work, "train.batch_tokens=512", *shlex.split(advice))
    assert onward.code == 0, onward.err
    assert "beginning with the weights of runs/small/checkpoints/step_00000004" in onward.out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("checkpoint.resume=runs/small model.rope_theta=5000", "step_00000004 is of another model:"),
        ("checkpoint.resume=runs/small train.batch_tokens=512", "step_00000004 is of a run with other steps"),
        ("checkpoint.resume=runs/small moe.router.score=sigmoid", "step_00000004 is of another model:"),
        ("checkpoint.weights_from=runs/small model.qk_norm=true", "step_00000004 is of another model:"),
        ("checkpoint.resume=runs/small data.seed=9", "was made with another order of the training text"),
        ("checkpoint.resume=runs/small train.steps=3", "is past this config's last step"),
    ],
)
def test_nothing_is_made_for_a_run_that_is_refused(
    wrong: str, message: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    config = load_config("config.yaml", ["name=q", *wrong.split()])
    with pytest.raises(UserError, match=message):
        make_run_folder(Plan.from_config(config), prepare(config))
    if "data.seed" not in wrong:  # that is known when the text is prepared
        with pytest.raises(UserError, match=message):
            claim_run_folder(Plan.from_config(config))
        assert cli(["config", "check", "config.yaml", "name=q", *wrong.split()]) == 2
        assert message in capsys.readouterr().err
    assert not Path("runs/q").exists()


def test_a_check_says_what_a_start_would_say_of_the_run_that_is_there(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    assert cli(["config", "check", "config.yaml", "moe.num_experts=8"]) == 2
    assert "runs/small belongs to another config: moe.num_experts is 4 there and 8 here" in capsys.readouterr().err
    assert cli(["config", "check", "config.yaml", "train.steps=9"]) == 0
    assert "changed since the run was last started: train.steps, 4 -> 9" in capsys.readouterr().err
    assert cli(["config", "check", "config.yaml", "name=q", "checkpoint.resume=always"]) == 2


def test_a_start_that_fails_before_its_first_step_binds_the_next_one_to_nothing(work: Path) -> None:
    newest = work / "runs" / "small" / "checkpoints" / "step_00000004" / "rank_00000_000.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(start(work, "name=q", "checkpoint.resume=runs/small", "train.steps=5"), "it is not what was written")
    assert not (work / "runs" / "q" / "config.yaml").exists()
    other = start(work, "name=q", "optimizer.weight_decay=0.3", "moe.top_k=1", "moe.router.normalize_weights=false")
    assert other.code == 0, other.err


CHANGED = {
    "optimizer.betas": ("(0.9, 0.95)", "[0.8, 0.9]"),
    "optimizer.eps": ("1e-08", "1e-06"),
    "optimizer.weight_decay": ("0.1", "0.2"),
    "moe.balance.aux_loss": ("0.02", "0.5"),
    "moe.router.noise": ("none", "jitter"),
    "moe.router.force_balanced": ("False", "true"),
    "moe.capacity.factor": ("null", "2.0"),
    "train.seed": ("0", "5"),
    "train.precision": ("fp32", "bf16"),
}


def test_what_differs_from_the_run_whose_checkpoint_is_gone_on_from_is_said(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    options = ["name=q", "checkpoint.resume=runs/small", "runs_dir=others", "data.cache_dir=other"]
    newest = "runs/small/checkpoints/step_00000004"
    assert check_run_folder(Plan.from_config(load_config("config.yaml", options))).notes == ()
    changed = [f"{key}={here}" for key, (_, here) in CHANGED.items()]
    notes = check_run_folder(Plan.from_config(load_config("config.yaml", [*options, *changed]))).notes
    said = {note.partition(": ")[2].partition(", ")[0]: note for note in notes}
    assert said.keys() == CHANGED.keys()
    assert all(note.startswith(f"changed since {newest} was saved: ") for note in notes)
    assert said["moe.capacity.factor"].endswith(": moe.capacity.factor, null -> 2.0")
    assert said["optimizer.weight_decay"].endswith(": optimizer.weight_decay, 0.1 -> 0.2")


def test_looking_at_checkpoints_changes_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where they are damaged, and where a run is at work."""
    run = work / "runs" / "small"
    newest = run / "checkpoints" / "step_00000004"
    (newest / "manifest.json").unlink()
    (run / "checkpoints" / ".step_00000005.partial").mkdir()
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    assert cli(["checkpoint", "show", str(run)]) == 0
    assert "step_00000003" in capsys.readouterr().out
    assert cli(["checkpoint", "verify", str(run)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert before == {path: path.lstat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize(
    "change",
    ["optimizer.lr=0.001", "optimizer.warmup_steps=3", "optimizer.grad_clip=0.1", "optimizer.min_lr=0.0001"],
)
def test_what_one_changes_after_a_divergence_may_change(
    change: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    beginning = check_run_folder(Plan.from_config(load_config("config.yaml", [change])))
    key, _, value = change.partition("=")
    assert beginning.checkpoints[0].name == "step_00000004"
    assert len(beginning.notes) == 1
    assert beginning.notes[0].startswith(f"changed since the run was last started: {key}, ")
    assert beginning.notes[0].endswith(f"-> {value}")


# ---- the last save

FULL = """
import errno, os, sys
from dsmoe.checkpoint import safetensors, saving
from dsmoe.train import run
number, often = int(sys.argv.pop(1)), int(sys.argv.pop(1))
saving.PAUSES, saving.WORTH_SECONDS = (0.2, 0.2), (1.0, 1.0)
write, left = safetensors._write, [often]
def full(path, *arguments):
    if "step_00000004" in str(path) and os.environ.get("RANK", "0") == os.environ["FULL_RANK"]:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
    return write(path, *arguments)
safetensors._write = full
os._exit(run.main())
"""


@pytest.mark.parametrize(
    ("ranks", "number", "often", "code"),
    [(1, errno.ENOSPC, 99, 1), (1, errno.EACCES, 99, 2), (1, errno.EIO, 2, 0), (2, errno.ENOSPC, 2, 0)],
)
def test_how_a_run_ends_whose_last_save_fails(ranks: int, number: int, often: int, code: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"every": 1, "keep": 2}}
    write_config(tmp_path, ranks=ranks, runs_dir="runs", **options)
    (tmp_path / "full.py").write_text(FULL, encoding="utf-8")
    folder = tmp_path / "runs" / "small" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".step_00000002.removed").symlink_to(tmp_path)
    (folder / ".step_00000003.partial.swp").touch()
    arguments = [str(number), str(often), "--config", "config.yaml"]
    outcome = start_on_ranks(ranks, tmp_path, *arguments, script=tmp_path / "full.py", FULL_RANK=str(ranks - 1))
    assert outcome.code == code, outcome.err
    assert "the last save is tried again in 0 s" in outcome.out
    last = 3 if code else 4
    assert [path.name for path in all_checkpoints(folder)] == [f"step_0000000{step}" for step in (last - 1, last)]
    verify(folder / f"step_0000000{last}")
    assert "Traceback" not in outcome.err
    if code:
        assert "error: cannot save runs/small/checkpoints/step_00000004: " in outcome.err
        assert os.strerror(number) in outcome.err


def record_wrongly(checkpoint: Path) -> None:
    """Another learning rate than there is, with the checksum of that."""
    content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    del content["sha256"]
    content["facts"]["config"]["optimizer"]["lr"] = "high"
    (checkpoint / MANIFEST).write_text(_sealed(content), encoding="utf-8")


def test_a_checkpoint_that_records_its_run_wrongly_is_passed_over_as_any_damaged_one(work: Path) -> None:
    run = work / "runs" / "small"
    *_, earlier, newest = all_checkpoints(run / "checkpoints")
    before = (run / "config.yaml").read_text(encoding="utf-8")
    kept = {path: (path / MANIFEST).read_text(encoding="utf-8") for path in all_checkpoints(run / "checkpoints")}
    for checkpoint in kept:
        record_wrongly(checkpoint)
    none = start(work, "train.steps=5")
    assert (none.code, "Traceback" in none.err) == (2, False)
    assert re.search(
        r"^error: \S+ is damaged: facts\.config\.optimizer\.lr: .+move this one away", none.err, re.MULTILINE
    )
    assert (run / "config.yaml").read_text(encoding="utf-8") == before
    (earlier / MANIFEST).write_text(kept[earlier], encoding="utf-8")
    one = start(work, "train.steps=5")
    assert one.code == 0, one.err
    assert f"passed over: runs/small/checkpoints/{newest.name} is damaged: facts.config.optimizer.lr: " in one.out
    assert f"continuing from runs/small/checkpoints/{earlier.name}" in one.out
