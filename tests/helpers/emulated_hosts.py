"""Hosts of a cluster on this one machine: Linux namespaces with an address each, and links that can be cut and slowed.

A host is a process in network, host-name, process, IPC and mount namespaces of its own; its cable ends in a port of a
bridge, in a namespace of its own too. Nothing has a name outside of them and every process dies with the one that
made the cluster, however that ends: two clusters do not meet, and none is left behind (of a cluster whose maker is
killed, a folder with keys in the temporary directory is). Hosts share the file system.

    with Cluster(2) as (first, second):
        second.shape("100mbit")
        print(first.run(["ssh", second.name, "hostname"]).output)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDED = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}
"""The commands that a cluster is made with, and the Debian packages that have them."""

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("--net", "--uts", "--pid", "--ipc", "--mount")
CABLE = "eth0"


def missing() -> str | None:
    """Why no cluster can be made here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = sorted({package for command, package in NEEDED.items() if not shutil.which(command, path=SYSTEM_PATH)})
    if packages:
        return f"apt-get install {' '.join(packages)}"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    return f"this container may not make namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    output: str
    seconds: float


class Task:
    """A command that runs on a host, with both of its outputs in one file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self.output = output
        self._begun = time.monotonic()
        with output.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=-3)

    def wait(self, timeout: float) -> Outcome:
        """How it ended; a failure with all of its output where it does not within `timeout` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}") from None
        return Outcome(code, self.text(), time.monotonic() - self._begun)

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until the output contains `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            ended = self._process.poll() is not None
            assert not ended or text in self.text(), f"ended without saying {text!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """What it has written until now."""
        return self.output.read_text(errors="replace", encoding="utf-8")


class Host:
    """One host: `name` and `address` are what the others know it by."""

    def __init__(self, number: int, folder: Path, switch: int) -> None:
        self.name = f"host{number}"
        self.address = f"10.77.0.{number + 1}"
        self._port = f"port{number}"
        self._folder = folder
        self._switch = switch
        self._tasks = 0
        self._holder, self._pid = _new_namespaces()
        _call("ip", "link", "add", self._port, "type", "veth", "peer", CABLE, "netns", str(self._pid), net=switch)
        _call("ip", "link", "set", self._port, "master", "bridge", "up", net=switch)
        for line in (
            f"hostname {self.name}",
            f"ip address add {self.address}/24 dev {CABLE}",
            f"ip link set {CABLE} up",
            "ip link set lo up",
            "mount -t tmpfs tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd",
            f"mount --bind {folder}/hosts /etc/hosts",
            f"mount --bind {folder}/ssh_config /etc/ssh/ssh_config",
            f"{shutil.which('sshd', path=SYSTEM_PATH)} -f {folder}/sshd_config -E {folder}/{self.name}.sshd",
        ):
            self._call(*line.split())

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = Path("/")
    ) -> Task:
        """Start `command` on this host, with this process' environment and `environment`."""
        self._tasks += 1
        output = self._folder / f"{self.name}.{self._tasks}"
        return Task([*_enter(self._pid, cwd), *command], {**os.environ, **(environment or {})}, output)

    def run(self, command: Sequence[str], timeout: float = 20, **options: object) -> Outcome:
        """Run `command` on this host to its end."""
        return self.start(command, **options).wait(timeout)  # type: ignore[arg-type]

    def shape(self, rate: str) -> None:
        """Slow the link down to `rate` (`100mbit`), in both directions."""
        bucket = ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "200ms")
        self._call("tc", "qdisc", "replace", "dev", CABLE, *bucket)
        _call("tc", "qdisc", "replace", "dev", self._port, *bucket, net=self._switch)

    def unshape(self) -> None:
        """Make the link fast again."""
        self._call("tc", "qdisc", "delete", "dev", CABLE, "root")
        _call("tc", "qdisc", "delete", "dev", self._port, "root", net=self._switch)

    def cut(self) -> None:
        """Let the switch drop what this host sends and is sent; nobody is told."""
        _call("ip", "link", "set", self._port, "nomaster", net=self._switch)

    def heal(self) -> None:
        """Undo `cut`."""
        _call("ip", "link", "set", self._port, "master", "bridge", net=self._switch)

    def kill(self) -> None:
        """Switch the host off: all of its processes at once."""
        self._holder.kill()
        self._holder.wait()

    def sent_bytes(self) -> int:
        """Bytes that have left by its interface, packet headers included."""
        (cable,) = json.loads(self._call("ip", "-json", "-statistics", "link", "show", "dev", CABLE))
        return int(cable["stats64"]["tx"]["bytes"])

    def _call(self, *command: str) -> str:
        return _call(*_enter(self._pid), *command)


class Cluster:
    """`num_hosts` hosts on one switch, while the context lasts."""

    def __init__(self, num_hosts: int) -> None:
        self._num_hosts = num_hosts
        self._folder = Path(tempfile.mkdtemp(prefix="dsmoe_cluster_"))
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        self._switch, switch = _new_namespaces()
        try:
            _call("ip", "link", "add", "bridge", "type", "bridge", net=switch)
            _call("ip", "link", "set", "bridge", "up", net=switch)
            self._write_files()
            for number in range(self._num_hosts):
                self.hosts.append(Host(number, self._folder, switch))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self._folder)

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def _write_files(self) -> None:
        """The hosts' names, and what sshd and ssh need to let each into the others."""
        folder = self._folder
        names = "".join(f"10.77.0.{number + 1} host{number}\n" for number in range(self._num_hosts))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + names, encoding="utf-8")
        for key in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nMaxStartups 100\n",
            encoding="utf-8",
        )
        # Without ServerAliveInterval, pdsh would wait for a host that is cut off for as long as TCP does: for ever.
        (folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  LogLevel ERROR\n  ServerAliveInterval 5\n  ServerAliveCountMax 2\n",
            encoding="utf-8",
        )


def _new_namespaces() -> tuple[subprocess.Popen[bytes], int]:
    """A process that holds new namespaces until it is killed, and the id of their first process.

    setpriv has the kernel kill it when the thread that called this ends; --kill-child hands that on to all processes
    of the host.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    holder = subprocess.Popen([*command, "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    if not holder.stdout.readline():
        raise RuntimeError("no namespaces can be made here")
    return holder, int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text(encoding="utf-8"))


def _enter(pid: int, folder: Path = Path("/")) -> list[str]:
    return ["nsenter", "--target", str(pid), *NAMESPACES, f"--wdns={folder}"]


def _call(*command: str, net: int | None = None) -> str:
    """Run a command of the system that must succeed, in the network namespace of process `net` where given."""
    inside = ["nsenter", "--target", str(net), "--net"] if net else []
    path = {"PATH": SYSTEM_PATH}
    done = subprocess.run(
        [*inside, *command], env=path, cwd="/", capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
