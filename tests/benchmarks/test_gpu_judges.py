"""What the stages of `benchmarks.gpu` make of what they see: each verdict for a right and for a wrong result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks import measuring
from benchmarks.gpu import limits, machine, memory, right, supervise, training
from benchmarks.gpu.training import NO_TIME, Bench, Run
from benchmarks.measuring import Deadline, Rows


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "cpu", 1, Deadline(60), tiny=True)


def write_losses(run: Run, losses: dict[int, float], held_out: float = 3.0) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "train/loss": loss} for step, loss in losses.items()]
    text = "\n".join(map(json.dumps, [*lines, {"step": max(losses), "eval/loss": held_out}]))
    (run.folder / "metrics.jsonl").write_text(text, encoding="utf-8")


STEPS = {step: 5.0 - step / 10 for step in range(1, 9)}


@pytest.mark.parametrize(
    ("changed", "passed", "detail"),
    [
        ({}, True, None),
        ({5: STEPS[5] * 1.004}, True, None),
        ({5: STEPS[5] * 1.006}, False, "step 5: 4.527, on the CPU 4.5, 0.60% off"),
        ({7: float("nan")}, False, "step 7: nan, on the CPU 4.3, nan% off"),
        ({6: None}, False, "no loss of step 6"),
        ({-1: 3.1}, False, "held out: 3.1, on the CPU 3, 3.33% off"),
    ],
)
def test_losses_are_held_against_the_cpus(
    bench: Bench, changed: dict[int, Any], passed: bool, detail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = bench.run("cpu_bf16", device="cpu")
    write_losses(reference, STEPS)
    (reference.folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    launchers = []

    def finish(run: Run, launcher: str = "torchrun") -> None:
        launchers.append((run.name, launcher))
        own = {**STEPS, **changed}
        held_out = own.pop(-1, 3.0)
        write_losses(run, {step: loss for step, loss in own.items() if step > 2 and loss is not None}, held_out)

    monkeypatch.setattr(Run, "finish", finish)
    row = training.as_on_a_cpu(bench, reference, "bf16", 1, 1, "torchrun")
    assert (row["passed"], row.get("detail")) == (passed, detail)
    training.as_on_a_cpu(bench, reference, "bf16", 1, 1, "deepspeed")
    assert len(set(launchers)) == 2, "a run of its own for each launcher: else the second finds the first one's end"


def test_a_reference_that_learns_nothing_proves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = bench.run("cpu_fp32", device="cpu")
    write_losses(reference, dict.fromkeys(STEPS, 5.0))
    (reference.folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    monkeypatch.setattr(Run, "finish", lambda run, _: write_losses(run, dict.fromkeys(STEPS, 5.0)))
    row = training.as_on_a_cpu(bench, reference, "fp32", 0, 1, "python")
    assert not row["passed"]
    assert "proves nothing" in row["detail"]


@pytest.mark.parametrize(("why", "passed"), [("exit code 1: boom", False), (NO_TIME, None)])
def test_runs_that_do_not_come_to_their_end(
    bench: Bench, why: str, passed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "finish", lambda *_: why)
    _, row = training.begin_on_cpu(bench, "bf16")
    reference = bench.run("cpu_bf16")
    (reference.folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    rows = [row, training.as_on_a_cpu(bench, reference, "bf16", 1, 1, "torchrun")]
    rows += training.through_a_kill(bench, "bf16", 1, 1)
    assert [(row["passed"], row["detail"]) for row in rows] == [(passed, why)] * 4


def test_nothing_is_started_after_the_deadline(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "cpu", 1, Deadline(0), tiny=True)
    assert bench.run("late").finish() == NO_TIME


def pair(bench: Bench, monkeypatch: pytest.MonkeyPatch, second: dict[str, Any]) -> str | None:
    """What differs between two runs whose checkpoints have these tensors, and their losses."""
    tensors = {"first": {"model/a": torch.ones(2)}, "second": second["tensors"]}
    for name, losses in (("first", STEPS), ("second", second.get("losses", STEPS))):
        write_losses(bench.run(name), losses)
        (bench.run(name).folder / "checkpoints" / second.get("step", "step_00000008")).mkdir(parents=True)
    if "step" in second:
        (bench.run("first").folder / "checkpoints" / "step_00000010").mkdir()
    monkeypatch.setattr(training, "_tensors", lambda path: tensors[path.parents[1].name])
    return training._difference(bench.run("first"), bench.run("second"))


@pytest.mark.parametrize(
    ("second", "difference"),
    [
        ({"tensors": {"model/a": torch.ones(2)}}, None),
        ({"tensors": {"model/a": torch.tensor([1.0, 1.0 + 2**-23])}}, "model/a differs in step_00000008"),
        ({"tensors": {}}, "model/a differs"),
        ({"tensors": {"model/a": torch.ones(2), "model/b": torch.ones(2)}}, "model/b differs"),
        ({"tensors": {"model/a": torch.ones(2)}, "losses": {**STEPS, 4: 4.7}}, "the loss of step 4 is 4.7 and was 4.6"),
        (
            {"tensors": {"model/a": torch.ones(2)}, "losses": {s: STEPS[s] for s in STEPS if s != 3}},
            "the loss of step 3 is None and was 4.7",
        ),
        ({"tensors": {"model/a": torch.ones(2)}, "step": "step_00000006"}, "it ended at step_00000006 and not at"),
    ],
)
def test_two_runs_differ_in_whatever_differs(
    bench: Bench, second: dict[str, Any], difference: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pair(bench, monkeypatch, second)
    assert found is None if difference is None else difference in found


def started(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs be this program."""
    monkeypatch.setattr(Run, "start", lambda run: subprocess.Popen([sys.executable, "-c", code, str(run.folder)]))


SAVES = (
    "import sys, time; from pathlib import Path;"
    "folder = Path(sys.argv[1], 'checkpoints'); [(folder / f'step_0000000{n}').mkdir(parents=True) for n in (2, 4)];"
)


def test_a_run_is_killed_in_the_middle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started(f"{SAVES} time.sleep(600)", monkeypatch)
    assert training._start_and_kill(bench.run("killed")) == 4


@pytest.mark.parametrize("code", ["pass", f"{SAVES} sys.exit(0)"])
def test_a_run_that_has_ended_was_not_killed(bench: Bench, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started(code, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: subprocess.run(["sleep", "0.5"]))  # it ends before it is looked at
    assert training._start_and_kill(bench.run("ended")) is None


@pytest.mark.parametrize(
    ("code", "passed", "detail"),
    [
        ("pass", True, None),
        ("print('ep=2 2 1.0 DIFFERENT: loss'); sys.exit(1)", False, "ep=2 2 1.0 DIFFERENT: loss"),
        ("raise ValueError('no such layout')", False, "exit code 1: ValueError: no such layout"),
    ],
)
def test_layouts_are_the_same_where_parity_says_so(
    bench: Bench, code: str, passed: bool, detail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.start
    program = [sys.executable, "-c", f"import sys; {code}"]
    monkeypatch.setattr(training, "start", lambda _, environment, output: real(program, environment, output))
    (row,) = training.same_on_layouts(bench, "fp32", padded=False)
    assert (row["passed"], row.get("detail")) == (passed, detail)


def test_layouts_use_every_exchange_and_group() -> None:
    text = " ".join(training.layouts_of(4))
    for part in ("hierarchical", "chunks=2", "sp=true", "etp=2", "zero=0", "zero=2", "ep=4", "ep=2"):
        assert part in text


@pytest.mark.parametrize(
    ("code", "passed", "counted"),
    [
        ("def test_a(): pass", True, (1, 0, 0)),
        ("def test_a(): assert 1 == 2\ndef test_b(): pass", False, (2, 1, 0)),
        ("import nothing_of_that_name", False, (1, 1, 0)),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", False, (1, 0, 1)),
        ("import atexit, os; atexit.register(os._exit, 139)\ndef test_a(): pass", False, (1, 0, 0)),
        ("", False, (0, 0, 0)),
    ],
)
def test_tests_are_counted(bench: Bench, code: str, passed: bool, counted: tuple[int, int, int]) -> None:
    file = bench.folder / "test_it.py"
    file.write_text(code, encoding="utf-8")
    (row,) = right.tested("it", [str(file)], bench)
    assert (row["passed"], (row["tests"], row["failures"], row["skipped"])) == (passed, counted)
    assert ("detail" in row) == (not passed)


def test_a_check_that_breaks_is_a_check_that_failed() -> None:
    def breaks() -> list[Any]:
        raise RuntimeError("boom")

    assert [row["passed"] for row in right.Check("it", breaks).run(Deadline(9))] == [False]
    assert [row["passed"] for row in right.Check("it", breaks).run(Deadline(0))] == [None]


def test_all_that_is_checked_on_eight_devices_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = [check.name for check in right.all_checks(Bench(tmp_path, "cuda", 8, Deadline(9), tiny=False))]
    assert len(names) == len(set(names)) == 2 + len(right.TESTS) + 3 + 4


def test_limits_are_shares_of_the_median_or_of_a_promise() -> None:
    row = limits._limit("compute", 0.8, [100.0, 90.0, 110.0, 95.0], "TFLOP/s")
    assert (row["median"], row["worst_share"], row["repeats"]) == (100.0, 0.9, 4)
    assert row["margin"] == pytest.approx(0.9 / 0.8)
    assert limits._limit("peak", 0.5, [300.0, 400.0], "TFLOP/s", whole=1000.0)["worst_share"] == 0.3


def test_preflights_table_becomes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = {"name": "link inside a node", "unit": "GB/s", "median": 10.0, "worst": 9.0, "promised": 20.0, "size": ""}
    latency = {**link, "name": "latency inside a node", "unit": "us", "worst": 15.0, "promised": None}
    found = {"exit_code": 1, "seconds": 3.0, "findings": [{"text": "slow"}], "checks": [link, latency]}
    monkeypatch.setattr(
        limits, "start", lambda *_: (tmp_path / "preflight.json").write_text(json.dumps(found), encoding="utf-8")
    )
    monkeypatch.setattr(limits, "wait_within", lambda *_: "exit code 1: slow")
    check, *rows = limits.preflight(Path("x.yaml"), [], 2, "cuda", tmp_path, Deadline(60))
    assert (check["passed"], check["exit_code"], check["findings"]) == (True, 1, ["slow"])
    assert [row["kind"] for row in rows] == ["preflight", "limit", "preflight", "limit"]
    assert rows[0]["of_promise"] == 0.5
    assert rows[1]["margin"] == pytest.approx(0.9 / 0.6)
    assert rows[3]["margin"] == pytest.approx((10 / 15) * 3)
    (late,) = limits.preflight(Path("x.yaml"), [], 2, "cuda", tmp_path, Deadline(0))
    assert late["passed"] is None


def test_preflight_that_leaves_no_numbers_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "start", lambda *_: None)
    monkeypatch.setattr(limits, "wait_within", lambda *_: "exit code 1: no device")
    (check,) = limits.preflight(Path("x.yaml"), [], 1, "cuda", tmp_path, Deadline(60))
    assert (check["passed"], check["detail"]) == (False, "exit code 1: no device")


GIB = 2**30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card of 80 GiB, of which others hold 2."""
    state = SimpleNamespace(allocated=10 * GIB, peak=10 * GIB, reserved=12 * GIB)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: setattr(state, "peak", state.allocated))
    monkeypatch.setattr(cuda, "memory_allocated", lambda *_: state.allocated)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda *_: state.peak)
    monkeypatch.setattr(cuda, "memory_reserved", lambda *_: state.reserved)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda *_: state.reserved + 3 * GIB)
    monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (80 * GIB - state.reserved - 2 * GIB, 80 * GIB))
    return state


def test_a_reading_tells_torchs_memory_from_others(card: SimpleNamespace) -> None:
    reading = memory.Reading.now(torch.device("cuda"))
    assert (reading.allocated, reading.reserved, reading.outside) == (10.0, 15.0, 2.0)


def test_peaks_belong_to_the_part_of_the_step_that_made_them(card: SimpleNamespace) -> None:
    def use(most: int, left: int) -> None:
        card.peak, card.allocated = card.allocated + most * GIB, card.allocated + left * GIB

    class Model(torch.nn.Module):
        def forward(self) -> None:
            use(5, 3)

    weight = torch.nn.Parameter(torch.zeros(2**8))
    optimizer = SimpleNamespace(state={}, param_groups=[{"params": [weight]}])

    def backward(_: object) -> None:
        weight.grad = torch.zeros_like(weight)
        use(7, -2)

    engine = SimpleNamespace(backward=backward, step=lambda: use(4, -1), optimizer=optimizer)
    model = Model()
    parts = memory.Parts(SimpleNamespace(engine=engine, model=model), torch.device("cuda"), before_gib=1.0)
    model()
    engine.backward(None)
    engine.step()
    assert parts.activations_gib == 3.0
    assert parts.peaks_gib == {
        "forward_peak_gib": 10 + 5 - 1,
        "backward_peak_gib": 10 + 3 + 7 - 1,
        "step_peak_gib": 10 + 3 - 2 + 4 - 1,
    }
    assert parts.gradients_gib * GIB == 4 * 2**8


def test_storages_are_counted_once() -> None:
    base = torch.zeros(8)
    assert memory.size_of([base, base[2:], base.view(2, 4)]) * GIB == 32
    assert memory.size_of([base, torch.zeros(2)], but=[base[1:]]) * GIB == 8


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            {"passed": False, "detail": "OutOfMemoryError: CUDA out of memory."},
        ),
        (None, {"passed": True, "parameters": 7}),
    ],
)
def test_memory_that_does_not_suffice_is_a_check_that_failed(
    error: Exception | None, row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> dict[str, Any]:
        if error:
            raise error
        return {"parameters": 7}

    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "join_processes", lambda _: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(memory, "leave_processes", lambda: None)
    monkeypatch.setattr(sys, "argv", ["memory", "--device", "cpu", "--tiny", "--rows", str(tmp_path / "rows")])
    assert memory.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"kind": "memory", "check": name} | row for name in memory.CONFIGURATIONS]


@pytest.mark.parametrize(("devices", "ranks"), [(1, 1), (3, 2), (6, 4), (8, 8), (16, 8)])
def test_a_machine_trains_on_a_power_of_two_of_its_devices(
    devices: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(
        measuring.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.159.04\n580.159.04\n")
    )
    facts = machine.describe("cuda", ["--minutes", "6"])
    assert (facts["devices"], facts["ranks"], facts["known_as"]) == (devices, ranks, "h200")
    assert (facts["driver"], facts["hardware"]) == ("580.159.04", "NVIDIA H200")
    assert facts["command"] == "python -m benchmarks.gpu --minutes 6"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "it printed nothing"),
        ("all\nwell\n---\n", "well"),
        ("a\nValueError: bad\nmore\n", "ValueError: bad"),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nW1: killed\n",
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("error: no such file\n", "error: no such file"),
        (
            "RuntimeError: NCCL\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\n",
            "RuntimeError: NCCL",
        ),
    ],
)
def test_the_line_that_tells_most(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text, encoding="utf-8")
    assert supervise.last_line(tmp_path / "log") == line


def test_killed_programs_take_their_children_along() -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", child])
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    supervise.end_tree(process)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while not all(map(has_ended, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(has_ended, children))


def test_how_a_program_ended_is_known_when_it_was_ended() -> None:
    process = subprocess.Popen(["sleep", "600"])
    supervise.end_tree(process, stacks_seconds=2.0)
    assert process.returncode == -signal.SIGABRT


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody has asked for its exit code
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("allowed", "patience", "why"), [(60.0, 2.0, "still running after 2 s"), (2.0, 60.0, NO_TIME)])
def test_a_program_that_hangs_leaves_where_it_stood(
    allowed: float, patience: float, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hang.py").write_text("import time\nprint('so far', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    output = tmp_path / "hang.out"
    process = training.start([sys.executable, str(tmp_path / "hang.py")], training.environment("cpu"), output)
    assert training.wait_within(Deadline(allowed), process, output, patience) == why
    printed = capsys.readouterr().out
    assert "so far" in printed
    assert 'hang.py", line 3' in printed


@pytest.mark.parametrize(
    ("cores", "ranks", "checks"), [(2, 2, 1), (16, 1, 8), (16, 8, 1), (128, 8, 2), (64, 1, 8), (1, 1, 1)]
)
def test_checks_share_cores_and_devices(cores: int, ranks: int, checks: int) -> None:
    assert right.checks_at_once(cores, ranks) == checks


def test_deepspeed_takes_the_devices_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert "localhost:5,7" in training.launch("deepspeed", 2)
    assert "localhost:5" in training.launch("deepspeed", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command = training.launch("deepspeed", 2)
    assert command[command.index("--num_gpus") + 1] == "2"


def test_a_machine_whose_triton_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = machine.why_not("cuda")  # there is no driver here
    assert reason is not None
    assert reason.startswith("Triton cannot compile its driver module (")
    assert machine.why_not("cpu") is None


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows")
    rows.add({"a": 1})
    assert (tmp_path / "rows").read_text(encoding="utf-8") == '{"a": 1}\n'
    rows.add({"b": None})
    assert len((tmp_path / "rows").read_text(encoding="utf-8").splitlines()) == 2
