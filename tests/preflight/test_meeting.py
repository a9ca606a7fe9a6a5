"""Before the ranks have met, each host speaks for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.helpers.ports import free_port


def test_a_node_without_the_config_says_so_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # where nobody is
    command = [sys.executable, "-m", "dsmoe", "preflight", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 1
    assert f"[rank 2 on {socket.gethostname()}] error: no such file: {tmp_path}/absent.yaml" in done.stderr
