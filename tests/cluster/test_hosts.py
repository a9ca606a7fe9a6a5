"""The harness itself: hosts reach each other, links can be cut, healed and slowed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.emulated_hosts import Cluster, missing

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")]

REPOSITORY = Path(__file__).parents[2]

TRANSFER = """
import socket, sys, time
if sys.argv[1] == "receive":
    listener = socket.create_server(("", 5001))
    print("listening", flush=True)
    connection, _ = listener.accept()
    while connection.recv(65536):
        pass
else:
    with socket.create_connection((sys.argv[2], 5001)) as connection:
        connection.sendall(bytes(int(sys.argv[3])))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
"""


def reaches(cluster: Cluster) -> bool:
    first, second = cluster.hosts[:2]
    connect = f"import socket; socket.create_connection(('{second.name}', 22), timeout=1)"
    return first.run([sys.executable, "-c", connect]).code == 0


def test_hosts_reach_each_other_by_name_and_run_commands_over_ssh() -> None:
    with Cluster(3) as cluster:
        first = cluster.hosts[0]
        names = {first.run(["ssh", host.name, "hostname"]).output.strip() for host in cluster}
        assert names == {"host0", "host1", "host2"}
        assert first.run(["hostname", "-I"]).output.split() == [first.address]
        processes = first.run(["sh", "-c", "cat /proc/[0-9]*/cmdline"]).output
        assert "sshd" in processes
        assert "pytest" not in processes


def test_a_link_is_cut_and_healed() -> None:
    with Cluster(2) as cluster:
        assert reaches(cluster)
        cluster.hosts[1].cut()
        assert not reaches(cluster)
        cluster.hosts[1].heal()
        assert reaches(cluster)


def test_a_shaped_link_is_slow_and_its_bytes_are_counted() -> None:
    size = 2_500_000  # 0.2 s at 100 Mbit/s, of which the bucket lets 0.01 s pass at once
    with Cluster(2) as (first, second):
        for rate, least, most in (("100mbit", 0.17, 2.0), (None, 0.0, 0.17)):
            first.shape(rate) if rate else first.unshape()
            receiver = second.start([sys.executable, "-c", TRANSFER, "receive"])
            receiver.wait_for("listening", 10)
            before = first.sent_bytes()
            timed = f"import time; begun = time.perf_counter()\n{TRANSFER}\nprint(time.perf_counter() - begun)"
            sender = first.run([sys.executable, "-c", timed, "send", second.address, str(size)])
            receiver.wait(10)
            assert least < float(sender.output) < most
            assert size < first.sent_bytes() - before < 1.3 * size  # headers, and what the bucket dropped, again


def test_two_clusters_do_not_meet() -> None:
    with Cluster(2) as one, Cluster(2) as other:
        one.hosts[1].cut()
        assert not reaches(one)
        assert reaches(other)


def living(marker: str) -> list[str]:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [command.decode() for command in commands if marker.encode() in command]


@pytest.mark.parametrize("way", ["left", "killed"])
def test_no_process_survives_the_one_that_made_it(way: str, tmp_path: Path) -> None:
    marker = f"dsmoe-{os.getpid()}-{way}"
    script = (
        "import time\nfrom tests.helpers.emulated_hosts import Cluster\n"
        "with Cluster(2) as cluster:\n"
        f"    cluster.hosts[0].start(['sh', '-c', 'sleep 1000; : {marker}'])\n"
        "    print(flush=True)\n"
        f"    time.sleep({1000 if way == 'killed' else 0})\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    maker = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    assert maker.stdout is not None
    maker.stdout.readline()
    if way == "killed":
        assert len(living(f": {marker}")) >= 1
        maker.send_signal(signal.SIGKILL)
    maker.wait(20)
    deadline = time.monotonic() + 10
    while living(f": {marker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(f": {marker}")
