"""`benchmarks.gpu`: a rehearsal of every stage, and each way in which one can go wrong without harming the others."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import adopt, supervise
from benchmarks.gpu.results import Outcome, Results, markdown, read_rows
from benchmarks.gpu.stages import STAGES, Machine, Stage, time_limit
from benchmarks.gpu.supervise import End
from benchmarks.measuring import RESULTS
from dsmoe.config import Config
from dsmoe.plan import count_parameters
from tests.helpers.faulty_stage import GOOD

ROOT = Path(__file__).parents[2]
GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
FACTS = {
    "command": "python -m benchmarks.gpu",
    "date": "2026-12-01 10:00 UTC",
    "hardware": "NVIDIA H100 80GB HBM3",
    "devices": 1,
    "driver": "580.159.04",
    "cuda": "13.0",
    "python": "3.12.3",
    "packages": {"torch": "2.11.0+cu130", "triton": "3.6.0", "liger-kernel": None},
    "ranks": 1,
    "known_as": "h100-sxm",
}


class Fault(Stage):
    def command(self, machine: Machine, rows: Path, allowed_seconds: float) -> list[str]:
        return [sys.executable, "-m", self.program, self.name, str(rows)]


def stages(*faults: str) -> tuple[Stage, ...]:
    return tuple(Fault(fault, "tests.helpers.faulty_stage", 60) for fault in faults)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *faults: str, minutes: float = 5.0) -> tuple[int, dict]:
    monkeypatch.setattr(command, "STAGES", stages(*faults))
    monkeypatch.setattr(command, "_find_machine", lambda *_: {**FACTS, "device": "cpu"})
    code = command.main(["--device", "cpu", "--tiny", "--minutes", str(minutes), "--out", str(folder)])
    return code, json.loads(next(folder.glob("gpu_*.json")).read_text(encoding="utf-8"))


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_every_stage_is_rehearsed_without_a_device(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--minutes", "18", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    logs = "\n".join(
        f"--- {path.name}\n{path.read_text(encoding='utf-8')[-3000:]}" for path in tmp_path.glob("*/*.log")
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    (file,) = tmp_path.glob("gpu_rehearsal_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = {stage["stage"]: stage["rows"] for stage in found["stages"]}
    assert list(rows) == [stage.name for stage in STAGES]
    kinds = {stage: {row["kind"] for row in of} for stage, of in rows.items()}
    assert kinds["right"] == {"training", "tests", "repeat", "resume", "layouts"}
    assert all(row["passed"] is True for row in rows["right"])
    (training,) = [row for row in rows["right"] if row["kind"] == "training"]
    assert 0 < training["largest_difference"] < training["bound"]
    assert {"layer", "kernel", "matrix_rate"} <= kinds["layer"]
    peers = {row["peer"] for row in rows["layer"] if row["kind"] == "layer" and "error" not in row}
    assert {"dense floor", "dsmoe dropless", "deepspeed no drop"} <= peers
    assert rows["step"][0]["speed_over"]
    for row in rows["memory"]:
        per_parameter = {name: row[f"{name}_gib"] * 2**30 / row["parameters"] for name in ("weights", "optimizer")}
        # ZeRO keeps masters beside the weights; without it the weights are their own masters.
        expected = (4, 8) if "fp32" in row["check"] else (2, 12)
        assert tuple(per_parameter.values()) == pytest.approx(expected, rel=0.01), row["check"]
        assert row["gradients_gib"] * 2**30 / row["parameters"] == pytest.approx(4, rel=0.01), "fp32, in bf16 too"
        assert row["settings"]["train"]["precision"] in row["check"]
        sources = [{"name": "corpus", "path": "corpus.txt"}]
        again = Config.model_validate({**row["settings"], "data": {"sources": sources}})
        assert count_parameters(again).total == row["parameters"], "a planner can be held against it"
    assert len(rows["memory"]) == 6
    limits = {row["what"].split(",")[0] for row in rows["preflight"] if row["kind"] == "limit"}
    assert limits == {"compute", "checksum of equal products", "storage", "link inside a node", "latency inside a node"}
    assert {row["kernel"] for row in rows["tune"] if row["kind"] == "best"} >= {"bag_sum", "activation_forward"}
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert page == markdown(found)
    assert "Rehearsal without a GPU" in page
    assert found["command"] in page
    assert done.stdout.count("\n") < 40, "the console has a line or two for a stage, and the table"
    assert {path.name for path in file.with_suffix("").iterdir()} == {f"{stage.name}.log" for stage in STAGES}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 8, "as many as a lent machine gives back"


def test_a_stage_that_fails_does_not_take_the_next_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found = run(monkeypatch, tmp_path, "killed", "garbage", "memory", "silent", "wrong", "fine")
    assert code == 1
    outcomes = {stage["stage"]: stage["word"] for stage in found["stages"]}
    assert outcomes == {
        "killed": "killed",
        "garbage": "failed",
        "memory": "failed",
        "silent": "failed",
        "wrong": "failed",
        "fine": "done",
    }
    why = {stage["stage"]: stage["why"] for stage in found["stages"]}
    assert why["killed"] == "SIGKILL, perhaps by the kernel for want of memory"
    assert why["garbage"].startswith("exit code 3: ")
    assert why["garbage"].endswith("2 of its lines are no figures")
    assert why["garbage"].isprintable()
    assert why["memory"] == "exit code 1: MemoryError"
    assert why["silent"] == "it ended without a figure"
    assert why["wrong"] == "1 of 1 checks failed, the first: sums agree (2 is not 3)"
    assert why["fine"] is None
    for stage in found["stages"]:
        assert stage["rows"][:1] == ([] if stage["stage"] == "silent" else [GOOD])


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(supervise, "STACKS_SECONDS", 1.0)
    code, found = run(monkeypatch, tmp_path, "hangs", "fine", minutes=0.25)
    hangs, fine = found["stages"]
    assert (code, hangs["word"], fine["word"]) == (1, "out of time", "done")
    assert hangs["rows"] == [GOOD]
    assert re.search(r"its time was up after [1-8] s", hangs["why"]), "half of what was left when it began"
    (log,) = (path.read_text(encoding="utf-8") for path in tmp_path.glob("*/hangs.log"))
    assert "faulty_stage.py" in log, "where it hung"
    assert not orphans()


def test_a_stage_that_prints_without_end_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "MOST_OUTPUT", 2**20)
    monkeypatch.setattr(supervise, "KEPT_OUTPUT", 2**10)
    monkeypatch.setattr(supervise, "STACKS_SECONDS", 0.5)
    log = tmp_path / "log"
    end = supervise.supervise(stages("endless")[0].command(None, tmp_path / "rows", 0), log, 60, dict(os.environ), ROOT)
    assert end.word == "out of time"
    assert "it had printed more than 1 MiB" in end.why
    assert log.stat().st_size < 2**12
    assert "bytes left out" in log.read_text(encoding="utf-8")


def test_a_program_that_does_not_exist_is_a_failure(tmp_path: Path) -> None:
    end = supervise.supervise(["/nowhere/python"], tmp_path / "log", 5, dict(os.environ), ROOT)
    assert end == End("failed", "cannot start /nowhere/python: No such file or directory", 0.0)


def begin(folder: Path, *faults: str) -> subprocess.Popen[str]:
    """A run in a process of its own, whose first stage hangs; returns when that has begun."""
    program = (
        "import sys; import benchmarks.gpu.__main__ as command; from tests.benchmarks import test_gpu as here;"
        "command.STAGES = here.stages(*sys.argv[2:]);"
        "command._find_machine = lambda *_: here.FACTS | {'device': 'cpu'};"
        "sys.exit(command.main(['--device', 'cpu', '--tiny', '--out', sys.argv[1]]))"
    )
    arguments = [str(folder), *faults]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    while not orphans():
        time.sleep(0.05)
    return process


def orphans() -> list[psutil.Process]:
    """What the stage that hangs has started in a session of its own, here and not in another run of these tests."""
    own = ("DSMOE_TESTS_CORPUS", os.environ["DSMOE_TESTS_CORPUS"])
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "signal.SIG_IGN); time.sleep(600)" in str(process.info["cmdline"])
        and own in (process.info["environ"] or {}).items()
    ]


@pytest.fixture(autouse=True)
def _leave_no_orphans() -> Iterator[None]:
    yield
    for process in orphans():
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_was_measured_is_kept_when_the_run_is_told_to_end(number: int, tmp_path: Path) -> None:
    process = begin(tmp_path, "hangs", "fine")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    found = json.loads(next(tmp_path.glob("gpu_*.json")).read_text(encoding="utf-8"))["stages"]
    assert [(stage["stage"], stage["word"]) for stage in found] == [("hangs", "interrupted"), ("fine", "not begun")]
    assert found[0]["rows"] == [GOOD]
    assert "hangs: interrupted in" in output
    assert not orphans()


def test_nothing_stays_on_the_device_when_the_run_is_killed(tmp_path: Path) -> None:
    process = begin(tmp_path, "hangs")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphans()


def test_time_goes_to_what_is_worth_most_and_what_is_left_to_the_rest() -> None:
    limits, left = [], 360.0
    for number, stage in enumerate(STAGES):
        limits.append(time_limit(stage, list(STAGES[number + 1 :]), left))
        left -= limits[-1]
    assert limits[:2] == [150.0, 105.0]
    assert sum(limits) == pytest.approx(360)
    assert min(limits) > 10
    whole = [
        time_limit(stage, list(STAGES[n + 1 :]), 540 - sum(s.seconds for s in STAGES[:n]))
        for n, stage in enumerate(STAGES)
    ]
    assert whole == pytest.approx([stage.seconds for stage in STAGES]), "nine minutes are what all of them want"
    assert time_limit(STAGES[-1], [], 300.0) == 300.0


class Parsed(Exception):  # noqa: N818
    """The command line has been understood."""


@pytest.mark.parametrize(
    "machine", [Machine("cuda", 8, "h100-sxm"), Machine("cuda", 1), Machine("cpu", 2, "cpu", True)]
)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stages_get_commands_that_their_programs_understand(
    stage: Stage, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, dash_m, module, *options = stage.command(machine, Path("rows"), 60.0)
    assert (python, dash_m) == (sys.executable, "-m")
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        found = parse(parser, arguments)
        assert found.rows == Path("rows")
        assert 0 < found.seconds < 60
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--minutes", "0"], "0 is not a number of minutes above 0"),
        (["--minutes", "x"], "x is not a number of minutes above 0"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--adopt", "README.md"], "README.md is not the JSON file of a run"),
        (["--adopt", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["--out", "README.md/x", "--device", "cpu", "--tiny"], "Not a directory"),
        ([], "torch sees no CUDA device here; `--device cpu --tiny` rehearses without one"),
    ],
)
def test_wrong_input_is_one_clear_error(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    try:
        code = command.main(arguments)
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_outcomes_say_what_is_missing() -> None:
    done = End("done", None, 3.0)
    rows = [{"check": "a", "passed": True}, {"check": "b", "passed": None}, {"value": 1}, {"error": "out of memory"}]
    outcome = Outcome.judge("right", done, rows, 0, 10.0)
    assert (outcome.word, outcome.why) == ("out of time", "no time for 1 of 2 checks")
    assert outcome.summary == "1 of 2 checks passed, 1 figure, 1 left out"
    assert Outcome.judge("layer", done, [{"value": 1}], 0, 10.0).is_done


def test_rows_of_a_file_that_was_never_made(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows") == ([], 0)


def results_in(folder: Path, date: str, *, rehearsal: bool = False, word: str = "done") -> Path:
    results = Results(folder, {**FACTS, "date": date}, rehearsal)
    best = {"kind": "best", "capability": "sm_90", "kernel": "permute", "sizes": {"block": 64, "warps": 2}}
    results.add(
        Outcome("right", word, None if word == "done" else "boom", 90.0, 150.0, [{"check": "a|b", "passed": True}])
    )
    results.add(
        Outcome("tune", "done", None, 9.0, 45.0, [{**best, "speedup": 1.2, "device": "H100", "date": date[:10]}])
    )
    return results.json_path


def repository(folder: Path) -> Path:
    (folder / adopt.RESULTS).mkdir(parents=True)
    (folder / "dsmoe" / "kernels").mkdir(parents=True)
    table = Path("dsmoe") / "kernels" / "blocks.json"
    (folder / table).write_text((ROOT / table).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "README.md").write_text(f"# x\n\n{adopt.BEGIN}\nold\n{adopt.END}\n\nmore\n", encoding="utf-8")
    return folder


def test_figures_of_another_machine_are_taken_over_whole(tmp_path: Path) -> None:
    root, elsewhere = repository(tmp_path / "repository"), tmp_path / "out"
    elsewhere.mkdir()
    file = results_in(elsewhere, "2026-12-01 10:00 UTC")
    changed = adopt.adopt(file, root)
    assert changed == [
        "took sm_90.permute into dsmoe/kernels/blocks.json",
        f"copied benchmarks/results/{file.name}",
        f"copied benchmarks/results/{file.stem}.md",
        "wrote the status in README.md",
    ]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "| 1 x NVIDIA H100 80GB HBM3, torch 2.11.0+cu130 | 2026-12-01 |" in readme
    assert f"[right, tune done](benchmarks/results/{file.stem}.md)" in readme
    assert readme.endswith(f"{adopt.END}\n\nmore\n")
    table = json.loads((root / "dsmoe" / "kernels" / "blocks.json").read_text(encoding="utf-8"))
    assert table["sm_90"]["permute"]["sizes"] == {"block": 64, "warps": 2}
    assert adopt.adopt(root / adopt.RESULTS / file.name, root)[-1] != "wrote the status in README.md"


@pytest.mark.parametrize("broken", ["no page", "no place", "no end"])
def test_what_cannot_be_taken_over_changes_nothing(broken: str, tmp_path: Path) -> None:
    root, elsewhere = repository(tmp_path / "repository"), tmp_path / "out"
    elsewhere.mkdir()
    file = results_in(elsewhere, "2026-12-01 10:00 UTC")
    readme = root / "README.md"
    match broken:
        case "no page":
            file.with_suffix(".md").unlink()
        case "no place":
            readme.write_text("# x\n", encoding="utf-8")
        case "no end":
            readme.write_text(f"# x\n{adopt.BEGIN}\nmuch more\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"is not there|has no place for the status"):
        adopt.adopt(file, root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_two_runs_of_a_day_are_two_results(tmp_path: Path) -> None:
    first, second = results_in(tmp_path, "2026-12-01 10:00 UTC"), results_in(tmp_path, "2026-12-01 10:01 UTC")
    assert first != second
    assert len(adopt.status(tmp_path).splitlines()) == 4, "of one device the newest"


def test_a_full_disk_costs_the_files_and_not_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "gone", FACTS, is_rehearsal=False)
    results.add(Outcome("right", "done", None, 90.0, 150.0, [{"check": "a", "passed": True}]))
    assert "error: cannot write" in capsys.readouterr().err
    assert results.table().splitlines()[1] == "right  done         90  150  1 of 1 check passed"


def test_two_runs_do_not_write_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, "fine")[0] == 0
    assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 2


def test_stages_do_not_take_a_launcher_around_them_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID", "PYTEST_ADDOPTS", "TORCHELASTIC_RUN_ID", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "8")
    environment = command._environment("cuda")
    assert not environment.keys() & {"LOCAL_WORLD_SIZE", "SLURM_PROCID", "PYTEST_ADDOPTS", "TORCHELASTIC_RUN_ID"}
    assert "TRITON_INTERPRET" not in environment
    assert command._environment("cpu")["TRITON_INTERPRET"] == "1"


def test_an_interpreter_without_a_package_is_told_which() -> None:
    program = "import runpy, sys; sys.modules['psutil'] = None; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert "has no psutil; docs/gpu.md says what is needed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rehearsal_changes_no_block_sizes_and_a_card_comes_before_it(tmp_path: Path) -> None:
    root = repository(tmp_path)
    before = (root / "dsmoe" / "kernels" / "blocks.json").read_text(encoding="utf-8")
    adopt.adopt(results_in(root / adopt.RESULTS, "2026-12-03 10:00 UTC", rehearsal=True), root)
    assert (root / "dsmoe" / "kernels" / "blocks.json").read_text(encoding="utf-8") == before
    assert "nothing yet" in adopt.status(root / adopt.RESULTS)
    results_in(root / adopt.RESULTS, "2026-12-01 10:00 UTC", word="failed")
    text = adopt.status(root / adopt.RESULTS)
    assert "[right failed (boom); tune done]" in text
    assert "nothing yet" not in text


def test_a_table_in_the_page_survives_any_text(tmp_path: Path) -> None:
    page = results_in(tmp_path, "2026-12-01 10:00 UTC").with_suffix(".md").read_text(encoding="utf-8")
    assert "| a\\|b | yes |" in page
    assert "driver 580.159.04, CUDA 13.0" in page


@pytest.mark.parametrize("line", re.findall(r"^python3? -m benchmarks.gpu(.*)$", GPU_PAGE, re.M))
def test_the_page_has_commands_that_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        command.main(shlex.split(line))


def test_the_page_has_every_stage_and_its_time() -> None:
    for stage in STAGES:
        assert f"| `{stage.name}` | {stage.seconds / 60:g} |" in GPU_PAGE


def test_the_readme_has_the_status_of_the_newest_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    box = text[text.index(adopt.BEGIN) + len(adopt.BEGIN) : text.index(adopt.END)].strip()
    assert box == adopt.status(RESULTS)
    assert text.index(adopt.BEGIN) < 2000, "at the top"
