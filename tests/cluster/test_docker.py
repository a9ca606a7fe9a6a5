"""Nodes in containers: as Kubernetes starts them, and in real containers of the image, which is built here."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from dsmoe.config import load_config
from dsmoe.launch.docker import job
from dsmoe.launch.job import Request
from dsmoe.plan.plan import Plan
from tests.helpers.emulated_hosts import Cluster, Host, Task, missing
from tests.helpers.launching import ENVIRONMENT, REPOSITORY, losses, write_config

NEEDED = ("buildah", "podman", "podman-compose", "runc", "mmdebstrap")
LACKING = [name for name in NEEDED if not shutil.which(name)] + (["root"] if os.geteuid() else [])
CONTAINERS = """
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[containers]
default_ulimits = ["nofile=16384:16384", "{nproc}"]
[network]
network_config_dir = "{folder}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/running"
"""
NPROC = "nproc=32768:32768"
"""podman asks for more processes than a machine may allow, also where a compose file names other limits."""


def start_pod(host: Host, index: int, first: Host, config: Path) -> Task:
    """Start the image's entry point with what a pod of the manifest has in its environment, and write down its id."""
    _, job = yaml.safe_load_all((REPOSITORY / "docker" / "kubernetes.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [variable["name"] for variable in container["env"]] == ["MASTER_ADDR"]
    command = [sys.executable, str(REPOSITORY / "docker" / "entrypoint.py"), container["args"][0], str(config)]
    environment = {**ENVIRONMENT, "JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": first.name}
    return host.start(["sh", "-c", f'echo $$ > pod{index}; exec "$@"', "sh", *command], environment, config.parent)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"no cluster here: {missing()}")
def test_pods_stop_together_and_go_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, 2, 1, train={"steps": 60})
    with Cluster(2) as cluster:
        first, second = cluster
        pods = [start_pod(host, index, first, config) for index, host in enumerate(cluster)]
        pods[0].wait_for("step 3/", 120)
        second.run(["kill", "-TERM", (tmp_path / "pod1").read_text(encoding="utf-8").strip()])
        stopped = [pod.wait(120) for pod in pods]
        assert [outcome.code for outcome in stopped] == [75, 75], stopped[0].output + stopped[1].output
        pods = [start_pod(host, index, first, config) for index, host in enumerate(cluster)]
        finished = [pod.wait(120) for pod in pods]
    assert [outcome.code for outcome in finished] == [0, 0], finished[0].output + finished[1].output
    assert "continuing from" in finished[0].output
    assert len(losses(tmp_path)) == 60


class Engine:
    """buildah and podman with storage of their own, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder), encoding="utf-8")
        (folder / "containers.conf").write_text(CONTAINERS.format(nproc=NPROC, folder=folder), encoding="utf-8")
        files = {"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf"}
        self.environment = {**os.environ, **{key: str(folder / name) for key, name in files.items()}}

    def run(self, *command: str | Path, check: bool = True) -> str:
        options = {"env": self.environment, "cwd": REPOSITORY, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # type: ignore[call-overload]
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout[-5000:]}"
        return str(done.stdout)

    def base(self) -> str:
        """A Debian image without a registry."""
        self.run("mmdebstrap", "--variant=minbase", "bookworm", self.folder / "base.tar")
        self.run("podman", "import", self.folder / "base.tar", "localhost/debian:bookworm")
        return "localhost/debian:bookworm"

    def build(self, base: str) -> str:
        """The CPU image, with this machine's configuration of pip, of which nothing stays in it."""
        mounts = [word for there, here in self._pip().items() for word in ("--volume", f"{here}:{there}:ro")]
        index = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
        arguments = ["--build-arg", f"BASE={base}", "--build-arg", f"TORCH_INDEX={index}", "--tag", "dsmoe:test"]
        command = ["buildah", "bud", "--isolation", "chroot", *mounts, *arguments, "--file", "docker/Dockerfile", "."]
        return self.run(*command)

    def _pip(self) -> dict[str, Path]:
        """Files by their names while building: pip's settings, and what they name on this machine."""
        said = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        )
        settings = {key.split(".")[1]: value for key, value in re.findall(r"^(\S+)='(.*)'$", said.stdout, re.MULTILINE)}
        mounts = {f"/host/{name}": Path(settings[name]) for name in ("cert", "find-links") if name in settings}
        parser = configparser.ConfigParser()
        parser["global"] = {
            key: f"/host/{key}" if f"/host/{key}" in mounts else value
            for key, value in settings.items()
            if f"/host/{key}" in mounts or key == "index-url"
        }
        with (self.folder / "pip.conf").open("w", encoding="utf-8") as file:
            parser.write(file)
        return {**mounts, "/etc/pip.conf": self.folder / "pip.conf"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.run("podman", "rmi", "--all", "--force", check=False)


@pytest.mark.containers
@pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_two_containers_train(engine: Engine, tmp_path: Path) -> None:
    base = engine.base()
    begun = time.monotonic()
    engine.build(base)
    seconds = time.monotonic() - begun
    (image,) = json.loads(engine.run("podman", "image", "inspect", "dsmoe:test"))
    print(f"\nbuilt in {seconds:.0f} s: {image['Size'] / 1e9:.2f} GB")
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == "dsmoe"
    found = engine.run(
        "podman", "run", "--rm", "dsmoe:test", "sh", "-c", "id -u; which cc gcc g++ clang nvcc make; true"
    )
    assert found == "10001\n"
    _two_nodes_train(engine, tmp_path)


def _two_nodes_train(engine: Engine, folder: Path) -> None:
    """The services of a compose file like the committed one stop, go on, and end as one machine does."""
    path = "configs/tiny_cpu.yaml"
    train = {"steps": 40, "batch_tokens": 512, "micro_batch_size": 2, "sequence_length": 128, "eval_sequences": 2}
    overrides = [*(f"train.{key}={value}" for key, value in train.items()), "train.eval_every=null"]
    overrides += ["data.sources=[{name: prose, path: 'builtin:shakespeare'}]"]  # builtin:python is each Python's own
    overrides += ["optimizer.warmup_steps=5", "observe.log_every=1", "observe.layer_detail_every=null"]
    alone = [sys.executable, "docker/entrypoint.py", "pretrain", path, *overrides, f"runs_dir={folder}/runs"]
    environment = {**engine.environment, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*alone, f"data.cache_dir={folder}/cache"], cwd=REPOSITORY, env=environment, check=True)

    overrides += ["cluster.nodes=2", "cluster.devices_per_node=1"]
    plan = Plan.from_config(load_config(REPOSITORY / path, overrides))
    job(Request(plan, path, tuple(overrides), str(folder))).write(folder)
    project = f"dsmoe_test_{os.getpid()}"
    compose = [
        "podman-compose",
        f"--podman-run-args=--ulimit={NPROC}",
        "--project-name",
        project,
        "--file",
        str(folder / "compose.yaml"),
    ]
    engine.environment |= {"DSMOE_IMAGE": "dsmoe:test", "PWD": str(REPOSITORY)}
    nodes = [f"{project}_node{number}_1" for number in range(2)]

    def logs() -> str:
        return "".join(engine.run("podman", "logs", node, check=False) for node in nodes)

    try:
        engine.run(*compose, "up", "--detach")
        _wait(lambda: "step 3/" in logs(), logs)
        networks = json.loads(engine.run("podman", "network", "inspect", f"{project}_nodes"))
        assert networks[0]["internal"] is True
        engine.run(*compose, "stop")
        assert [_state(engine, node)["ExitCode"] for node in nodes] == [75, 75], logs()
        engine.run(*compose, "up", "--detach")
        _wait(lambda: {_state(engine, node)["Status"] for node in nodes} == {"exited"}, logs)
        assert [_state(engine, node)["ExitCode"] for node in nodes] == [0, 0], logs()
        assert "continuing from /runs/tiny_cpu/checkpoints" in logs()
        engine.run("podman", "cp", f"{nodes[0]}:/runs/tiny_cpu", folder / "runs" / "in_containers")
    finally:
        engine.run(*compose, "down", "--volumes", check=False)
    assert len(losses(folder, "tiny_cpu")) == 40
    assert losses(folder, "in_containers") == pytest.approx(losses(folder, "tiny_cpu"), rel=1e-5)


def _state(engine: Engine, container: str) -> dict[str, object]:
    (inspected,) = json.loads(engine.run("podman", "container", "inspect", container))
    return dict(inspected["State"])


def _wait(until: Callable[[], bool], logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + 600
    while not until():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.5)
