"""Closed, full and abandoned standard streams decide nothing; no torch is imported, so real processes are cheap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from dsmoe.runtime.standard_streams import flush_streams, tolerate_stream_errors
tolerate_stream_errors()
with open("precious", "w") as file:
    if "a library" in sys.argv:
        os.write(1, b"to the console")
        os.write(2, b"to the console")
    for flush in (False, True):
        print("to the console \N{BEACH WITH UMBRELLA}", flush=flush)
        print("to the console", flush=flush, file=sys.stderr)
    file.write("kept")
flush_streams()
"""


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """`command` of bash, with `python` for this one."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    text = f"set -o pipefail; python() {{ '{sys.executable}' \"$@\"; }}; {command}"
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "how",
    [
        "'a library' >&-",
        "'a library' 2>&-",
        "'a library' <&- >&- 2>&-",
        ">/dev/full 2>/dev/full",
        "| true",
        "2>&1 | true",
        ">&2 2>/dev/null",
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_decide_nothing(how: str, unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = shell(tmp_path, f"export PYTHONUNBUFFERED={unbuffered} PYTHONIOENCODING=ascii; python program.py {how}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "kept", "what is printed must not go to files"


@pytest.mark.parametrize("into", ["", "| cat", ">file && cat file"])
def test_what_is_printed_is_there_when_a_process_ends_at_once(into: str, tmp_path: Path) -> None:
    names = "from dsmoe.runtime.standard_streams import *"
    text = f"import os, sys; {names}; tolerate_stream_errors(); print('last'); flush_streams(); os._exit(0)"
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    assert shell(tmp_path, f"python program.py {into}").stdout == "last\n"


def test_a_command_whose_output_is_the_point_says_that_it_did_not_fit(tmp_path: Path) -> None:
    done = shell(tmp_path, "python -m dsmoe config schema >/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_a_reader_that_has_seen_enough_hears_of_no_error(tmp_path: Path) -> None:
    done = shell(tmp_path, "python -m dsmoe config schema | true")
    assert done.stderr == ""
