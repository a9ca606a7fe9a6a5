"""The page on launching tells the truth: on two hosts, its commands print what it shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.emulated_hosts import Cluster, Outcome, missing
from tests.helpers.launching import ENVIRONMENT, REPOSITORY, losses

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}"),
    pytest.mark.timeout(900),
]

PAGE = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8").partition("## When something goes wrong")[0]
(YAML,) = re.findall(r"```yaml\n# two_nodes.yaml\n(.*?)```", PAGE, re.DOTALL)
SHOWN = dict(re.findall(r"```text\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL))
ON_EVERY_HOST = re.findall(r"^\w.* K .*$", "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)), re.MULTILINE)
VARIABLES = {name: ENVIRONMENT[name] for name in ("PATH", "PYTHONPATH", "DS_ACCELERATOR")}
"""What `source .venv/bin/activate` does for a reader, and PYTHONPATH for a copy of the repository under test."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the reader's, with the repository in it."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "pretrain.py").symlink_to(REPOSITORY / "launch" / "pretrain.py")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "two_nodes.yaml").write_text(YAML, encoding="utf-8")
    return tmp_path


def typed(command: str, cluster: Cluster, folder: Path) -> list[Outcome]:
    """Type it on the first host, or on every one where it has a K."""
    hosts = list(cluster) if " K " in command else cluster.hosts[:1]
    lines = [command.replace(" K ", f" {number} ") for number in range(len(hosts))]
    tasks = [host.start(["sh", "-c", line], VARIABLES, folder) for host, line in zip(hosts, lines, strict=True)]
    return [task.wait(600) for task in tasks]


def without_measurements(line: str) -> str:
    """The line without what differs from machine to machine, in the last digits or altogether."""
    line = re.sub(r" \S+ tok/s.*| in [\d.]+ s$", "", line)
    return line if re.search(r"ranks:|batch:|parameters:", line) else re.sub(r"\d\.\d+", "#", line)


def test_the_page_is_what_happens(folder: Path) -> None:
    (pdsh,) = [command for command in SHOWN if command.startswith("DS_ENV_FILE=")]
    assert (len(SHOWN), len(ON_EVERY_HOST)) == (7, 2)
    trained = []
    with Cluster(2) as cluster:
        for command, shown in SHOWN.items():
            (outcome,) = typed(command, cluster, folder)
            wrong = shown.startswith("error: ")
            assert (outcome.code != 0) == wrong, outcome.output
            printed = iter([without_measurements(line) for line in outcome.output.splitlines()])
            missing_lines = [
                line for line in shown.splitlines() if without_measurements(line) not in printed
            ]  # in order
            assert missing_lines == [], outcome.output
            if command == pdsh:
                trained.append(losses(folder, "two_nodes"))
        for command in ON_EVERY_HOST:
            shutil.rmtree(folder / "runs")
            outcomes = typed(command, cluster, folder)
            assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
            trained.append(losses(folder, "two_nodes"))
    assert trained[1:] == [pytest.approx(trained[0], rel=1e-5)] * 2
    assert trained[0][-1] == pytest.approx(float(re.findall(r"step 20/20 .* loss ([\d.]+)", SHOWN[pdsh])[0]), rel=0.02)
    hostfile = (folder / "launch" / "two_nodes" / "hostfile").read_text(encoding="utf-8")
    assert all(f"#     {command}\n" in hostfile for command in [*ON_EVERY_HOST, pdsh])
