"""A stage that goes wrong: `python -m tests.helpers.faulty_stage FAULT ROWS`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GOOD = {"kind": "figure", "value": 1.5}


def main(fault: str, rows: Path) -> None:
    if fault != "silent":
        rows.write_text(json.dumps(GOOD) + "\n", encoding="utf-8")
    match fault:
        case "hangs":  # as torchrun does, with a worker in a session of its own, which ignores requests
            orphan = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", orphan], start_new_session=True)
            time.sleep(600)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "garbage":
            sys.stdout.buffer.write(bytes(range(256)) * 20)
            with rows.open("ab") as lines:
                lines.write(b'{"kind": "figure", "val\xff\x00\n[1, 2]\n')
            sys.exit(3)
        case "endless":
            while True:
                sys.stdout.write("all work and no play " * 1000)
        case "memory":
            held = bytearray(2**62)
            print(len(held))
        case "wrong":
            with rows.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"check": "sums agree", "passed": False, "detail": "2 is not 3"}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
