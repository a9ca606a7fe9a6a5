"""Reports of where ranks stand: of failures, on SIGQUIT, of crashes; and what they leave behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dsmoe.runtime import watchdog as module
from dsmoe.runtime.failure_reports import KEPT_FOLDERS, FailureReports, make_folder
from dsmoe.runtime.spawn import CONTEXT, run_ranks
from dsmoe.runtime.watchdog import Watchdog


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def of_rank(folder: Path, rank: int) -> str:
    return (folder / f"rank_{rank:05d}.txt").read_text(encoding="utf-8")


def two_ranks_in_one_process(folder: Path) -> list[FailureReports]:
    module.HEARTBEAT_SECONDS = 0.02  # type: ignore[misc]
    store = dist.HashStore()
    both = [FailureReports(folder, Watchdog(store, rank, 2)) for rank in range(2)]
    for rank, reports in enumerate(both):
        reports._watch.reports = reports
        reports._watch.record(f"layer {rank}, exchange", step=7)
    return both


def ask(folder: Path) -> None:
    first, _ = two_ranks_in_one_process(folder)
    first.install()
    os.kill(os.getpid(), signal.SIGQUIT)
    wait_until(lambda: "another rank was asked" in of_rank(folder, 1))
    asked = of_rank(folder, 0)
    assert asked.startswith(f"=== rank 0 of 2 on {os.uname().nodename}, process {os.getpid()}\n")
    assert "it was asked to (SIGQUIT)" in asked
    assert "stands at: step 7, layer 0, exchange; " in asked
    assert "GiB resident" in asked
    assert "in wait_until" in asked.split("--- thread MainThread")[1]
    os.kill(os.getpid(), signal.SIGQUIT)  # and again
    wait_until(lambda: of_rank(folder, 1).count("another rank was asked") == 2)
    time.sleep(0.2)
    assert of_rank(folder, 0).count("=== rank 0") == 2, "the asked rank is not asked by itself"


def test_a_rank_that_is_asked_reports_and_hands_it_on(tmp_path: Path) -> None:
    run_ranks(1, ask, tmp_path)


def fail(folder: Path) -> str:
    first, second = two_ranks_in_one_process(folder)
    assert second._watch.announce_failure() == 1
    try:
        raise RuntimeError("the disk is on fire")
    except RuntimeError as error:
        second.write_failure("it has failed", error)
    wait_until(lambda: "rank 1 has failed" in of_rank(folder, 0))
    first.write_failure("a collective failed")
    assert of_rank(folder, 0).count("===") == 1, "what follows a failure is not another"
    assert "RuntimeError: the disk is on fire" in of_rank(folder, 1)
    return second.gather("[rank 1] the disk is on fire")


def test_when_one_rank_fails_all_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "failures")
    (text,) = run_ranks(1, fail, folder)
    assert f"is in {folder} (2 of 2 have written)" in text
    assert "rank 0: step 7, layer 0, exchange; " in text
    assert "rank 1: step 7, layer 1, exchange; fail (tests/runtime/test_failure_reports.py:" in text
    for written in (folder / "summary.txt", tmp_path / "train.log"):
        assert written.read_text(encoding="utf-8") == f"[rank 1] the disk is on fire\n{text}\n"


def stand_together(folder: Path) -> str:
    module.HEARTBEAT_SECONDS = 0.02  # type: ignore[misc]
    store = dist.HashStore()
    for rank in (0, 1, 2, 4, 5):
        reports = FailureReports(folder, Watchdog(store, rank, 6))
        reports._watch.record("layer 1, exchange" if rank != 4 else "reading data", step=3)
        reports.write_failure("a collective failed")
    return reports.gather("gone")


def test_the_odd_rank_comes_first_and_who_is_silent_is_counted(tmp_path: Path) -> None:
    (text,) = run_ranks(1, stand_together, make_folder(tmp_path / "failures"))
    first, silent, odd, others = text.splitlines()
    assert first.endswith("(5 of 6 have written):")
    assert silent == "  rank 3: no report"
    assert odd.startswith("  rank 4: step 3, reading data; stand_together (")
    assert others.startswith("  ranks 0-2, 5: step 3, layer 1, exchange; stand_together (")


def crash(folder: Path) -> None:
    FailureReports(folder, Watchdog(dist.HashStore(), 0, 1)).install()
    ctypes.string_at(0)


def test_a_crash_leaves_the_stacks(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=crash, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGSEGV
    assert "Segmentation fault" in of_rank(tmp_path, 0)
    assert "in crash" in of_rank(tmp_path, 0)


def keep_the_lock(folder: Path) -> None:
    module.HEARTBEAT_SECONDS = 0.02  # type: ignore[misc]
    reports = FailureReports(folder, Watchdog(dist.HashStore(), 0, 1))
    reports._watch.timeout = timedelta(seconds=0.5)
    reports.install()
    time.sleep(0.2)
    ctypes.PyDLL(None).sleep(3)  # PyDLL: without letting go of Python's lock
    assert "Timeout (0:00:00.5" in of_rank(folder, 0)
    assert "in keep_the_lock" in of_rank(folder, 0)


def test_a_library_that_keeps_pythons_lock_is_seen(tmp_path: Path) -> None:
    run_ranks(1, keep_the_lock, tmp_path)


def fail_beside(folder: Path, bare: str) -> str:
    (folder / "rank_00000.txt").write_text(bare, encoding="utf-8")
    other = FailureReports(folder, Watchdog(dist.HashStore(), 1, 2))
    other.write_failure("a collective failed")
    return other.gather("gone")


THREAD = """{} 0x01 (most recent call first):
  File "/x/site-packages/torch/{}.py", line 3 in {}
  File "{}", line 4 in main
"""


@pytest.mark.parametrize(
    ("first_line", "threads", "shown"),
    [
        ("Fatal Python error: Segmentation fault\n\n", ("Current thread", "Thread"), "current_thread"),
        ("Fatal Python error: Segmentation fault\n\n", ("Thread", "Current thread"), "current_thread"),
        ("Timeout (0:00:20)!\n", ("Thread", "Thread"), "last"),  # the main thread is the last
        ("=== rank 0\nstands at: here\n\nTimeout (0:00:20)!\n", ("Thread", "Thread"), "last"),
    ],
)
def test_bare_stacks_are_in_the_summary(first_line: str, threads: tuple[str, str], shown: str, tmp_path: Path) -> None:
    names = ["current_thread" if kind == "Current thread" else "other" for kind in threads]
    if shown == "last":
        names[-1] = "last"
    stacks = [THREAD.format(kind, name, name, __file__) for kind, name in zip(threads, names, strict=True)]
    (text,) = run_ranks(1, fail_beside, make_folder(tmp_path / "failures"), first_line + "\n".join(stacks))
    told = first_line.strip().splitlines()[-1]
    assert f"  rank 0: {told} {shown} (torch/{shown}.py:3)\n" in text + "\n"


def test_a_report_after_bare_stacks_is_the_one_that_counts(tmp_path: Path) -> None:
    bare = "Timeout (0:00:20)!\n" + THREAD.format("Thread", "x", "x", __file__) + "\n=== rank 0\nstands at: here; x\n"
    (text,) = run_ranks(1, fail_beside, make_folder(tmp_path / "failures"), bare)
    assert "  rank 0: here; x\n" in text + "\n"


def fill_the_disk(folder: Path) -> None:
    (folder / "rank_00000.txt").symlink_to("/dev/full")
    reports = FailureReports(folder, Watchdog(dist.HashStore(), 0, 1))
    reports.write_failure("it has failed")
    (folder / "rank_00000.txt").unlink()  # reading /dev/full never ends


def test_a_full_disk_does_not_hide_the_failure(tmp_path: Path) -> None:
    run_ranks(1, fill_the_disk, tmp_path)


def end_well(failures: Path) -> None:
    folder = make_folder(failures)
    both = [FailureReports(folder, Watchdog(dist.HashStore(), rank, 2)) for rank in range(2)]
    for reports in both:
        reports.install()
        reports.close()


def test_nothing_is_left_of_a_run_that_ends_well(tmp_path: Path) -> None:
    run_ranks(1, end_well, tmp_path / "failures")
    assert not list(tmp_path.iterdir())


def test_old_folders_go_and_so_do_those_without_a_report(tmp_path: Path) -> None:
    folders = []
    for number in range(KEPT_FOLDERS + 2):
        folders.append(make_folder(tmp_path))
        (folders[-1] / "rank_00000.txt").write_text("a report" if number != 1 else "", encoding="utf-8")
    newest = make_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == [*folders[3:], newest]
