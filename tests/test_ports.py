"""Ports of tests that run side by side are different, and nobody who asks the system for any port is given one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ports
from tests.helpers.ports import PORTS, free_port

ASK = "from tests.helpers.ports import free_port; print(*(free_port() for _ in range(100)), flush=True); input()"


def test_two_workers_have_different_ports() -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ASK],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for _ in range(3)
    ]
    given = [worker.stdout.readline().split() for worker in workers if worker.stdout]  # all live until all have said
    for worker in workers:
        worker.communicate("\n")
    assert [len(ports) for ports in given] == [100] * 3
    assert len({port for ports in given for port in ports}) == 300


def test_a_port_is_none_that_the_system_hands_out_or_a_program_has() -> None:
    assert {int(free_port()) for _ in range(20)} <= set(PORTS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(free_port())))
        taken.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ports, "PORTS", range(taken.getsockname()[1], taken.getsockname()[1] + 1))
            patch.setattr(ports, "_marks", [])
            with pytest.raises(OSError, match="no port from"):
                free_port()
