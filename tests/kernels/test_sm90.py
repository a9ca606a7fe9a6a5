"""The kernels compile for an H100 on any machine, keep to its registers and move whole vectors.

With codes that they have no branch for they do not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.kernels.blocks import TABLE, read


@pytest.mark.slow
def test_kernels_compile_for_sm90_without_spills_in_whole_vectors(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = tmp_path / "reports.json"  # stdout is not ours alone: DeepSpeed warns there of an accelerator it guesses
    command = [sys.executable, "-m", "tests.helpers.sm90", str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text(encoding="utf-8"))
    reports, refusals = results["launches"], results["refusals"]
    for message, name in zip(refusals, ["score softplus"] * 2 + ["activation tanh"] * 2, strict=True):
        assert f"this kernel has no branch for the {name}" in message
    assert len(reports) == 22 + 12 * (2 if "sm_90" in read(TABLE) else 1)
    for name, report in reports.items():
        assert report["spill stores"] == report["spill loads"] == 0, (name, report)
        assert report["double precision"] == 0, (name, report)
        assert (report["to nearest bf16"] > 0) == ("bfloat16" in name and "bags of 1" not in name), (name, report)
        if "torch." in name:
            # Nothing but weights, ends and row numbers comes or goes one by one.
            narrow = [report.get(f"{access} {bits}", 0) for access in ("ld", "st") for bits in (8, 16)]
            assert sum(narrow) == 0, (name, report)
            assert report["ld 128"] >= 1, (name, report)
            assert report["st 128"] >= 1, (name, report)
