"""A real Slurm on the hosts of an emulated cluster: slurmctld on the first, a slurmd on each of the others.

    with Slurm(2) as slurm:
        job = slurm.submit("pretrain.sbatch", folder)
        job.wait_for_end(60)

Every daemon runs in its host's namespaces and ends with them; what they write is in one folder, which goes with the
cluster. Requires what `missing()` names.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from tests.helpers import emulated_hosts
from tests.helpers.emulated_hosts import SYSTEM_PATH, Cluster, Host, Task
from tests.helpers.launching import ENVIRONMENT

NEEDED = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
"""As `hosts.NEEDED`: commands, and the Debian packages that have them."""

MOUNT_CGROUPS = ["mount -t tmpfs tmpfs /sys/fs/cgroup"] + [
    f"mkdir /sys/fs/cgroup/{name} && mount -t cgroup -o {options} {name} /sys/fs/cgroup/{name}"
    for name, options in [
        ("systemd", "none,name=systemd"),
        *((c, c) for c in ("freezer", "memory", "cpuset", "cpuacct", "devices")),
    ]
]
"""slurmd looks for these as it starts, whatever its plugins use."""

GRACE_SECONDS = 15
LOST_SECONDS = 12
"""After so long without an answer, a node is down."""

CONFIGURATION = """
ClusterName=emulated
SlurmctldHost=host0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# What a requeued job waits for, 120 seconds by default; the least that is taken is 5.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# Nodes have the processors and devices that are written here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={grace}
# How long a job that has ended is known, 300 seconds by default: tests ask at their own pace.
MinJobAge=3600
SlurmdTimeout={lost}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=host[1-{nodes}] CPUs=16
# Eight nodes that do not answer: jobs for them can be submitted, and wait.
NodeName=h100-[1-8] NodeAddr=10.78.0.[1-8] CPUs=128 Gres=gpu:8 State=DOWN Reason=imagined
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=host[1-{nodes}] PriorityTier=2
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    packages = sorted({package for command, package in NEEDED.items() if not shutil.which(command, path=SYSTEM_PATH)})
    return emulated_hosts.missing() or (f"apt-get install {' '.join(packages)}" if packages else None)


class SlurmJob:
    """A job that has been submitted from `folder`."""

    def __init__(self, slurm: Slurm, number: str, folder: Path) -> None:
        self._slurm, self.number = slurm, number
        self.folder = folder

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        text = self._slurm.call("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def restarts(self) -> int:
        """How many times it has been queued again."""
        return int(self.facts()["Restarts"])

    def text(self) -> str:
        """What the script has said, and then the ranks, node by node."""
        outputs = [*self.folder.glob(f"*-{self.number}.out"), *self.folder.glob(f"runs/*/logs/{self.number}-*.log")]
        return "\n".join(path.read_text(errors="replace", encoding="utf-8") for path in sorted(outputs))

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until it, or one of its ranks, has said `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s: {self.facts()}\n{self.text()}"
            time.sleep(0.2)

    def wait_for_end(self, timeout: float) -> str:
        """Wait until it is over, and return the state."""
        deadline = time.monotonic() + timeout
        while (state := self.facts()["JobState"]) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"still there after {timeout} s: {self.facts()}\n{self.text()}"
            time.sleep(0.2)
        return state


class Slurm:
    """A cluster of `num_nodes` nodes and a head, while the context lasts."""

    def __init__(self, num_nodes: int) -> None:
        self._cluster = Cluster(num_nodes + 1)
        self._folder = Path(tempfile.mkdtemp(prefix="dsmoe_slurm_"))
        self._environment = {**ENVIRONMENT, "SLURM_CONF": str(self._folder / "slurm.conf")}
        self._daemons: list[Task] = []

    def __enter__(self) -> Slurm:
        try:
            self._cluster.__enter__()
            self._write_files()
            for host in self._cluster:
                self._start_daemons(host)
            nodes = len(self._cluster.hosts) - 1
            self.wait_for_nodes(f"host[1-{nodes}]", nodes, 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.__exit__()
        shutil.rmtree(self._folder)

    def node(self, name: str) -> Host:
        """The host of this name."""
        return next(host for host in self._cluster if host.name == name)

    def call(self, *command: str, cwd: Path = Path("/")) -> str:
        """Run a command on the head, which must succeed; returns what it says."""
        outcome = self._cluster.hosts[0].run(command, environment=self._environment, cwd=cwd)
        assert outcome.code == 0, f"{' '.join(command)}: {outcome.output}"
        return outcome.output.strip()

    def submit(self, script: str, folder: Path, *options: str) -> SlurmJob:
        """`sbatch` a script in `folder`."""
        return SlurmJob(self, self.call("sbatch", "--parsable", *options, script, cwd=folder), folder)

    def _write_files(self) -> None:
        folder, nodes = self._folder, len(self._cluster.hosts) - 1
        text = CONFIGURATION.format(folder=folder, nodes=nodes, grace=GRACE_SECONDS, lost=LOST_SECONDS)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        (folder / "gres.conf").write_text("NodeName=h100-[1-8] Name=gpu Count=8\n", encoding="utf-8")
        (folder / "state").mkdir()
        for host in self._cluster.hosts[1:]:
            (folder / f"spool-{host.name}").mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(64))

    def _start_daemons(self, host: Host) -> None:
        folder = self._folder
        files = f"--log-file {folder}/{host.name}.munge --pid-file /run/munge/pid --seed-file /run/munge/seed"
        lines = [] if Path("/sys/fs/cgroup/cgroup.controllers").exists() else MOUNT_CGROUPS  # one tree: version 2
        lines = [*lines, "mkdir /run/munge", f"munged --force --key-file {folder}/munge.key {files}"]
        done = host.run(["sh", "-ec", "\n".join(lines)], environment={"PATH": SYSTEM_PATH})
        assert done.code == 0, done.output
        daemon = "slurmctld" if host is self._cluster.hosts[0] else "slurmd"
        self._daemons.append(host.start([daemon, "-D"], self._environment))

    def wait_for_nodes(self, names: str, number: int, timeout: float) -> None:
        """Wait until so many nodes of these `names` are there and have nothing to do."""
        deadline = time.monotonic() + timeout
        command = ["sinfo", "--noheader", "--partition=urgent", f"--nodes={names}", "--format=%D %t"]
        while True:
            told = self._cluster.hosts[0].run(command, 60, environment=self._environment)
            if told.output.strip() == f"{number} idle":
                return
            said = "\n".join(daemon.text() for daemon in self._daemons)
            assert time.monotonic() < deadline, f"not idle within {timeout} s: {told.output}\n{said}"
            time.sleep(0.1)
