"""The picture of a run: well-formed, inside its frame, and with the figures of the run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.draw_run import HEIGHT, WIDTH, main

ROWS = [
    {"step": 0, "eval/bits_per_byte": 8.5},
    {"step": 10, "train/loss": 3.0, "moe/load_max_over_mean": 3.5, "moe/load_max_over_mean/mean": 2.5},
    {"step": 20, "train/loss": 2.0, "moe/load_max_over_mean": 1.5, "moe/load_max_over_mean/mean": 1.25},
    {"step": 20, "eval/bits_per_byte": 2.7123},
]


def test_a_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    log = "run x\na bigram model of the same tokens reaches 3.616 bits/byte on the held-out text\n"
    (tmp_path / "train.log").write_text(log, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["draw_run", str(tmp_path), str(tmp_path / "run.svg")])
    main()
    text = (tmp_path / "run.svg").read_text(encoding="utf-8")
    drawn = {element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"bigram model 3.616", "2.712"} <= drawn
    lines = [[pair.split(",") for pair in points.split()] for points in re.findall(r"points='(.*?)'", text)]
    assert all(0 < float(x) < WIDTH and 0 < float(y) < HEIGHT for line in lines for x, y in line)
    (loss,) = [line for line in lines if len(line) == 2 and line[0] == ["50.0", "77.6"]]
    assert loss[1] == ["420.0", "257.8"]
