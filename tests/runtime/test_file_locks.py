"""Locks end with their process, and file systems without locks are detected."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from dsmoe.config.errors import UserError
from dsmoe.runtime.file_locks import HeldError, machine, take
from dsmoe.train import run_folder

CONTEXT = multiprocessing.get_context("fork")


def hold(path: Path, held: object) -> None:
    take(path)
    held.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_it_is_held_until_its_holder_dies(tmp_path: Path) -> None:
    path, held = tmp_path / "lock", CONTEXT.Event()
    holder = CONTEXT.Process(target=hold, args=(path, held))
    holder.start()
    assert held.wait(60)
    with pytest.raises(HeldError):
        take(path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    lock = take(path)
    assert lock.works
    lock.release()
    take(path).release()


def test_one_whose_file_is_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two processes would hold the lock: on the removed file and on the new one."""
    path, flock = tmp_path / "lock", fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lock = take(path)
    assert os.path.samestat(os.fstat(lock.descriptor), path.stat())
    with pytest.raises(HeldError):
        take(path)
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_lets_a_run_begin_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert not take(tmp_path / "lock").works
    with caplog.at_level(logging.WARNING):
        run_folder._take(tmp_path / "lock")
    assert f"{tmp_path} is on a file system without locks (flock)" in caplog.text
    assert "start it once at a time" in caplog.text


def test_a_run_that_is_held_is_refused(tmp_path: Path) -> None:
    lock = take(tmp_path / "lock")
    with pytest.raises(UserError, match="another process is training in"):
        run_folder._take(tmp_path / "lock")
    lock.release()


def test_other_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/lock'"):
        take(tmp_path / "lock")


def test_the_machine_is_the_same_for_all_its_processes() -> None:
    with CONTEXT.Pool(1) as pool:
        assert pool.apply(machine) == machine()
