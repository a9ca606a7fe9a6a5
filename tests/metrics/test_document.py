"""docs/metrics.md is fresh, and other pages name metrics that exist."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dsmoe.metrics.definitions import GROUPS, METRICS, find
from dsmoe.metrics.document import page
from dsmoe.metrics.metric import Metric
from tests.helpers.sources import REPOSITORY


def test_the_page_is_fresh() -> None:
    written = (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8")
    assert written == page(), "python -m dsmoe.metrics.document > docs/metrics.md"


def test_the_command_needs_no_more_than_the_standard_library() -> None:
    command = [sys.executable, "-S", "-m", "dsmoe.metrics.document"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=60, check=True)
    assert done.stdout == page()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_has_a_row(metric: Metric) -> None:
    (row,) = (line for line in page().splitlines() if line.startswith(f"| `{metric.name}`"))
    assert metric.meaning in row
    assert metric.source in row
    assert row.count("|") == 5


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in (REPOSITORY / "docs").glob("*.md"))])
def test_pages_name_metrics_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(GROUPS)})/[\w/<>]+)`", text)
    assert not [name for name in named if find(name) is None]
