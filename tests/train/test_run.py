"""The command that users type: what it trains, writes and says, and how it refuses wrong input."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe.config import UserError, dump_config, load_config
from dsmoe.runtime import failure_exit
from dsmoe.runtime.atomic_files import write_whole
from dsmoe.runtime.failure_exit import print_failure, report_failure
from dsmoe.runtime.processes import DeviceError, HostError
from dsmoe.runtime.spawn import CONTEXT
from tests.helpers.forked import Outcome, start_on_ranks
from tests.helpers.ports import free_port
from tests.helpers.small_runs import small_config

REPOSITORY = Path(__file__).parents[2]

PROMISED = {
    "optim/grad_norm",
    "optim/lr",
    "optim/skipped_steps",
    "throughput/tokens_per_second",
    "throughput/step_seconds",
    "throughput/tokens_per_second_per_device",
    "throughput/data_wait_seconds",
    "throughput/tflops_per_device",
    "throughput/tflops_per_device_causal",
    "memory/peak_gib",
    "progress/tokens",
    "progress/percent",
    "moe/balance_loss",
    "moe/z_loss",
    "moe/load_max_over_mean",
    "moe/load_cv",
    "moe/dead_expert_percent",
    "moe/routing_entropy_normalized",
    "moe/dropped_percent",
    "moe/dropped_weight_percent",
    "moe/capacity_used_percent",
    "moe/all_to_all_gib/intra",
    "moe/all_to_all_gib/inter",
}


def _main_in_child(folder: str, arguments: list[str], streams: str) -> None:
    os.chdir(folder)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{streams}/{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    from dsmoe.checkpoint import folder as checkpoint_folder
    from dsmoe.train import run_folder as run_folders
    from dsmoe.train.run import main

    checkpoint_folder.LOOKS = run_folders.LOOKS = (0.05, 0.2)  # the pauses before a damaged file is read again
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pretrain(folder: Path, *arguments: str) -> Outcome:
    """`python launch/pretrain.py ARGUMENTS` in `folder`, in a forked child that has torch already."""
    with tempfile.TemporaryDirectory() as streams:
        process = CONTEXT.Process(target=_main_in_child, args=(str(folder), list(arguments), streams))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "did not end"
        return Outcome(
            process.exitcode,
            (Path(streams) / "out").read_text(encoding="utf-8"),
            (Path(streams) / "err").read_text(encoding="utf-8"),
        )


def launch(folder: Path, *command: str, timeout: float = 200) -> Outcome:
    """A real launcher in `folder`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        encoding="utf-8",
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_config(folder: Path, **options: object) -> Path:
    """A config that trains in a second."""
    config = small_config(folder, **options)  # type: ignore[arg-type]
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def test_one_rank_trains_and_leaves_the_whole_run_folder(tmp_path: Path) -> None:
    train = {"steps": 6, "eval_every": 4}
    observe = {"log_every": 2, "layer_detail_every": 4, "tensorboard": True}
    config = write_config(tmp_path, train=train, observe=observe, checkpoint={"every": 4}, runs_dir="runs")
    outcome = pretrain(tmp_path, "--config", str(config))
    assert outcome.code == 0, outcome.err

    run = tmp_path / "runs" / "small"
    assert load_config(run / "config.yaml") == load_config(config)
    assert json.loads((run / "ds_config.json").read_text(encoding="utf-8"))["gradient_accumulation_steps"] == 8
    assert json.loads((run / "environment.json").read_text(encoding="utf-8"))["packages"]["torch"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 4, 6]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert all(set(line) >= PROMISED for line in training)
    assert [line["step"] for line in training if "moe/layer_001/load_cv" in line] == [4]
    assert "checkpoint/stall_seconds" in training[2]

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [
        (line["step"], line["train/loss"]) for line in training
    ]
    for text in (outcome.out, (run / "train.log").read_text(encoding="utf-8")):
        assert "step 6/6 100.0% loss" in text
        assert "held-out bits per byte" in text
        assert "what to run next" in text


def test_going_on_appends_and_a_finished_run_says_its_result_again(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 4}, checkpoint={"every": 2}, runs_dir="runs"))
    assert pretrain(tmp_path, "--config", config).code == 0
    assert "continuing from" in pretrain(tmp_path, "--config", config, "train.steps=6").out
    lines = [
        json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    again = pretrain(tmp_path, "--config", config, "train.steps=6")
    assert again.code == 0
    assert "held-out bits per byte" in again.out
    (suggested,) = re.findall(r"launch/pretrain.py'? (--config \S+ \S+)", again.out)
    on = pretrain(tmp_path, *suggested.split())
    assert on.code == 0, on.err
    assert "step 12/12" in on.out
    refused(pretrain(tmp_path, *suggested.split(), "train.steps=5"), "is past this config's last step, 5")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 2}, runs_dir="runs"))
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pretrain(tmp_path, "--config", config)
        assert second.code == 1, "a scheduler is to try again"
        assert "error: another process is training in" in second.err
        assert "Traceback" not in second.err
    assert pretrain(tmp_path, "--config", config).code == 0


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = str(write_config(tmp_path, train={"steps": 2}, runs_dir="file/runs"))
    refused(pretrain(tmp_path, "--config", config), "runs_dir")


def test_a_lock_that_cannot_be_taken_is_said_with_a_way_out(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 2}, runs_dir="runs"))
    (tmp_path / "runs" / "small" / ".lock").mkdir(parents=True)
    outcome = pretrain(tmp_path, "--config", config)
    refused(outcome, "cannot lock the run folder")
    assert "or name another folder (runs_dir=...)" in outcome.err


def test_going_back_needs_the_later_checkpoints_out_of_the_way(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 4}, checkpoint={"every": 2}, runs_dir="runs"))
    assert pretrain(tmp_path, "--config", config).code == 0
    earlier = "checkpoint.resume=runs/small/checkpoints/step_00000002"
    refused(pretrain(tmp_path, "--config", config, earlier), "this run has a later one")
    fork = ("--config", config, earlier, "name=fork")
    assert "continuing from runs/small/checkpoints/step_00000002" in pretrain(tmp_path, *fork, "checkpoint.every=1").out
    assert "continuing from runs/fork/checkpoints/step_00000004" in pretrain(tmp_path, *fork).out, "the same command"
    other = "checkpoint.resume=runs/small/checkpoints/step_00000004"
    assert "continuing from" in pretrain(tmp_path, "--config", config, other, "name=fork").out
    refused(pretrain(tmp_path, *fork), "this run has a later one")


def test_a_run_that_only_skips_steps_ends(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 200}, observe={"log_every": 10}, runs_dir="runs"))
    outcome = pretrain(tmp_path, "--config", config, "optimizer.lr=1e30", "optimizer.grad_clip=0")
    assert outcome.code == 1
    assert "add to the same command: optimizer.lr=5e+29" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_dense_model_trains(tmp_path: Path) -> None:
    config = write_config(tmp_path, moe=None, train={"steps": 2}, model={"dense_layers": 0}, runs_dir="runs")
    outcome = pretrain(tmp_path, "--config", str(config))
    assert outcome.code == 0, outcome.err
    assert "bal " not in outcome.out


WRONG = {
    "unknown key": (["moe.num_gates=4"], "moe.num_gates: unknown key"),
    "misspelt key": (["moe.num_expert=4"], "did you mean 'num_experts'"),
    "wrong type": (["optimizer.lr=fast"], 'optimizer.lr: expected a number > 0, got "fast"'),
    "negative steps": (["train.steps=-1"], "train.steps: expected a whole number >= 1"),
    "expert degree": (
        ["parallel.expert=3", "cluster.devices_per_node=3", "train.batch_tokens=288"],
        "parallel.expert (3) must divide moe.num_experts (4)",
    ),
    "world size": (["cluster.devices_per_node=2"], "python alone started 1 x 1 = 1 rank, but"),
    "missing path": (["data.sources.0.path=/nowhere/text"], "/nowhere/text"),
    "empty corpus": (["data.sources.0.path=empty.txt"], "empty.txt"),
    "bad jsonl line": (["data.sources.0.path=bad.jsonl", "data.sources.0.format=jsonl"], "bad.jsonl:2"),
    "missing tokenizer": (["data.tokenizer=none.json"], "none.json"),
    "sequence too long": (
        ["train.sequence_length=16384", "model.max_sequence_length=16384", "train.batch_tokens=16384"],
        "16385",
    ),
    "nothing to resume": (["checkpoint.resume=always"], "checkpoint.resume is 'always'"),
    "unknown device": (["cluster.device=h1000"], "cluster.device"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, runs_dir="runs")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n', encoding="utf-8")
    overrides, message = WRONG[case]
    refused(pretrain(tmp_path, "--config", str(config), *overrides), message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "duplicate"),
        ("name: [a\n", "config.yaml"),
        ("- just\n- a list\n", "config.yaml"),
        ("", "config.yaml"),
    ],
)
def test_a_file_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    refused(pretrain(tmp_path, "--config", "config.yaml"), message)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{i}": i for i in range(300)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "large.json"))
    config = write_config(tmp_path, runs_dir="runs")
    outcome = pretrain(tmp_path, "--config", str(config), "data.tokenizer=large.json")
    refused(outcome, "300")
    assert "264" in outcome.err


def test_a_folder_of_another_config_is_left_alone(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, train={"steps": 2}, runs_dir="runs"))
    assert pretrain(tmp_path, "--config", config).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    outcome = pretrain(tmp_path, "--config", config, "moe.top_k=1", "moe.router.normalize_weights=false")
    refused(outcome, "moe.top_k is 2 there and 1 here")
    refused(pretrain(tmp_path, "--config", config, "checkpoint.resume=never"), "checkpoint.resume is 'never'")
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}


def refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2, (outcome.code, outcome.out, outcome.err)
    assert message in outcome.err
    assert "Traceback" not in outcome.out + outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "parallel"),
    [
        (("deepspeed", "--num_gpus", "2", "--master_port"), ["parallel.expert=2"]),
        (
            ("torchrun", "--nproc-per-node", "2", "--master-port"),
            ["parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"],
        ),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_two_ranks_under_a_launcher(launcher: tuple[str, ...], parallel: list[str], tmp_path: Path) -> None:
    config = write_config(tmp_path, ranks=2, train={"steps": 3}, runs_dir="runs")
    script = str(REPOSITORY / "launch" / "pretrain.py")
    outcome = launch(tmp_path, *launcher, free_port(), script, "--config", str(config), *parallel)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("step 3/3") == 1
    bad = ("name=wrong", "data.sources.0.path=/nowhere")
    wrong = launch(tmp_path, *launcher, free_port(), script, "--config", str(config), *bad)
    assert wrong.code == (2 if launcher[0] == "deepspeed" else 1)  # torchrun reports every failure as 1
    assert wrong.err.count("there is no file or folder /nowhere") == 1
    assert not [line for line in wrong.err.splitlines() if line.startswith(f'  File "{REPOSITORY / "dsmoe"}{os.sep}')]
    assert not (tmp_path / "runs" / "wrong").exists()


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_others_down_and_only_it_explains(tmp_path: Path) -> None:
    config = write_config(tmp_path, ranks=2, expert=2, runs_dir="runs")
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "from dsmoe.train import run, Trainer\n"
        "step = Trainer.step\n"
        "def failing(self):\n"
        "    if self.rank.rank == 1 and self.step_index == 2:\n"
        "        raise RuntimeError('the disk is on fire')\n"
        "    return step(self)\n"
        "Trainer.step = failing\n"
        "os._exit(run.main())\n",
        encoding="utf-8",
    )
    command = ("deepspeed", "--num_gpus", "2", "--master_port", free_port(), str(script), "--config", str(config))
    outcome = launch(tmp_path, *command, timeout=100)
    assert outcome.code == 1
    everything = outcome.out + outcome.err
    assert everything.count("RuntimeError: the disk is on fire") == 1
    assert everything.count("Traceback (most recent call last)") == 1
    assert "[rank 1] Traceback" in everything
    assert "failing (" in (next((tmp_path / "runs" / "small" / "failures").iterdir()) / "summary.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_a_rank_that_waits_for_others_says_for_whom_and_writes_its_stacks_on_sigquit(tmp_path: Path) -> None:
    config = write_config(tmp_path, ranks=2, cluster={"collective_timeout_seconds": 10})
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**os.environ, **meeting, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(config)]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        port = int(meeting["MASTER_PORT"])
        while port not in {connection.laddr.port for connection in psutil.Process(process.pid).net_connections()}:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGQUIT)
        assert process.wait(60) == 1
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "in _await_all" in text
    assert "error: 1 of 2 ranks (rank 1 on node 0, from 0) have not come within 10 s to 127.0.0.1:" in text
    assert "Traceback" not in text


def shared_error() -> Exception:
    error = UserError("bad")
    error.shared_by_all_ranks = True  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "after", "printed"),
    [
        (0, 0, UserError("bad"), 0, "bad\n"),
        (0, 0, shared_error(), 0, "bad\n"),
        (1, 1, UserError("bad"), 2, "[rank 1 on {host}] bad\n"),  # rank 0, which has it as well, is not reached
        (8, 0, shared_error(), 1, ""),
        (8, 0, HostError("bad"), 0, "[rank 8 on {host}] bad\n"),
        (3, 3, HostError("bad"), 1, ""),  # the host's first rank says it
        (3, 3, DeviceError("bad"), 1, "[rank 3 on {host}] bad\n"),
        (3, 3, RuntimeError("bad"), 1, "[rank 3 on {host}] bad\n"),
    ],
)
def test_who_explains_what_ends_a_rank_that_knows_no_other(
    rank: int,
    local_rank: int,
    error: Exception,
    after: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    print_failure(error, "bad")
    assert capsys.readouterr().err == printed.format(host=platform.node())
    assert len(slept) == after


def test_an_error_of_the_system_before_there_are_reports_says_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="No such file") as error:
        write_whole(Path("/none/such"), "")
    assert report_failure(error.value) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: /none/\S+: No such file or directory \(dsmoe/runtime/atomic_files\.py:\d+\)\n", said)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/data"), RuntimeError("a bug")])
def test_the_traceback_of_an_error_that_all_ranks_have_is_in_the_reports(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Exception] = []
    reports = SimpleNamespace(write_failure=lambda _, error: written.append(error))
    monkeypatch.setattr(failure_exit.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failure_exit, "process_watchdog", lambda: SimpleNamespace(reports=reports))
    error.shared_by_all_ranks = True  # type: ignore[attr-defined]
    report_failure(error)
    assert written == [error]


def test_two_nodes_without_ssh(tmp_path: Path) -> None:
    """Two launchers with a node rank each, as a job script starts them (here on one machine)."""
    cluster = {"nodes": 2, "devices_per_node": 1}
    config = write_config(tmp_path, cluster=cluster, expert=2, train={"steps": 3}, runs_dir="runs")
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n", encoding="utf-8")
    script = str(REPOSITORY / "launch" / "pretrain.py")
    shared = [
        "deepspeed",
        "--hostfile",
        "hostfile",
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
    ]
    with ThreadPoolExecutor(2) as nodes:
        started = [
            nodes.submit(launch, tmp_path, *shared, "--node_rank", str(node), script, "--config", str(config))
            for node in range(2)
        ]
        first, second = (node.result() for node in started)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "step 3/3" in first.out
    metrics = [
        json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert metrics[1]["moe/all_to_all_gib/inter"] > 0
    assert metrics[1]["moe/all_to_all_gib/intra"] == 0


@pytest.mark.slow
def test_nodes_that_do_not_share_the_run_folder_are_told_at_once(tmp_path: Path) -> None:
    cluster = {"nodes": 2, "devices_per_node": 1}
    config = write_config(tmp_path, cluster=cluster, expert=2, runs_dir="runs")
    script = str(REPOSITORY / "launch" / "pretrain.py")
    shared = [
        "torchrun",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        free_port(),
    ]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as nodes:
        started = [
            nodes.submit(launch, folder, *shared, "--node-rank", str(node), script, "--config", str(config))
            for node, folder in enumerate(folders)
        ]
        outcomes = [node.result() for node in started]
    assert "must be on storage that all nodes share" in outcomes[0].err
    assert not list((folders[0] / "runs").rglob("step_*"))


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    cluster = {"collective_timeout_seconds": 6}
    config = write_config(tmp_path, ranks=2, expert=2, cluster=cluster, runs_dir="runs")
    script = tmp_path / "hangs.py"
    script.write_text(
        "import os, time\n"
        "from dsmoe.train import run, Trainer\n"
        "step = Trainer.step\n"
        "def hanging(self):\n"
        "    if self.rank.rank == 1 and self.step_index == 2:\n"
        "        time.sleep(300)\n"
        "    return step(self)\n"
        "Trainer.step = hanging\n"
        "os._exit(run.main())\n",
        encoding="utf-8",
    )
    outcome = start_on_ranks(2, tmp_path, "--config", str(config), script=script)  # fails where it does not end
    assert outcome.code == 1
    everything = outcome.out + outcome.err
    assert "6000ms" in everything
    assert everything.count("a collective failed at step 3, layer blocks.1.ffn, exchange of rows") == 1
    assert re.search(r"rank 1 on \S+ is missing: alive, but still at step 2, reducing metrics", everything)
    assert "Traceback" not in everything
    (folder,) = (tmp_path / "runs" / "small" / "failures").iterdir()
    for text in (everything, (tmp_path / "runs" / "small" / "train.log").read_text(encoding="utf-8")):
        assert f"where each rank stood is in runs/small/failures/{folder.name} (2 of 2 have written)" in text
        assert re.search(r"rank 0: step 3, layer blocks.1.ffn, exchange.*; all_to_all_single \(torch/", text)
        assert re.search(rf"rank 1: step 2, reducing metrics; hanging \({script}:6\), called by run \(", text)
    stuck = (folder / "rank_00001.txt").read_text(encoding="utf-8")
    assert "because rank 0 has failed" in stuck
    assert "time.sleep(300)" in stuck.split("--- thread MainThread")[1]
    assert "gloo:all_to_all" in (folder / "rank_00000.txt").read_text(encoding="utf-8").split("--- the error")[0]


def test_no_lock_of_a_dead_run_is_waited_for_and_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed would build an op under TORCH_EXTENSIONS_DIR, and wait for ever for whoever died holding its lock."""
    extensions = tmp_path / "extensions"
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = write_config(tmp_path, train={"steps": 1}, runs_dir="runs")
    command = (sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(config))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("CXX", "/bin/false")
    outcome = launch(tmp_path, *command, timeout=90)
    assert outcome.code == 0, outcome.err
    assert [path for path in extensions.rglob("*") if path.is_file()] == [lock]
