"""The files of docker/: hadolint finds nothing, the compose file is the rendered one, the manifest fits its schema."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dsmoe.config import UserError, load_config
from dsmoe.launch.docker import job
from dsmoe.launch.job import Job, Request
from dsmoe.plan.plan import Plan
from dsmoe.runtime.container import rank_environments

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"


def render(path: str, *overrides: str) -> Job:
    return job(Request(Plan.from_config(load_config(REPOSITORY / path, overrides)), path, overrides, "docker"))


def parsed(rendered: Job) -> dict[str, Any]:
    tree = yaml.safe_load(rendered.files["compose.yaml"])
    assert isinstance(tree, dict)
    return tree


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_builder_sees_what_the_dockerfile_copies_and_no_more() -> None:
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    ignored, *rest = [
        line for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] != "#"
    ]
    assert ignored == "*"
    assert {line.removeprefix("!") for line in rest if line[0] == "!"} == copied
    assert all((REPOSITORY / name).exists() for name in copied)


def test_the_committed_compose_file_is_what_its_command_writes() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    (written,) = re.findall(r"Written by `dsmoe launch (.*) --docker --out docker`", text)
    path, *overrides = shlex.split(written)
    rendered = render(path, *overrides)
    assert rendered.files == {"compose.yaml": text}
    assert rendered.command == "docker compose --file docker/compose.yaml up"
    config = load_config(REPOSITORY / path, overrides)
    assert (config.name, config.cluster.nodes, config.cluster.devices_per_node) == ("tiny_cpu", 2, 1)


def test_nodes_without_gpus_are_services_of_one_machine() -> None:
    tree = parsed(
        render("configs/tiny_cpu.yaml", "cluster.nodes=4", "cluster.devices_per_node=1", "train.micro_batch_size=4")
    )
    assert list(tree["services"]) == ["node0", "node1", "node2", "node3"]
    for number, service in enumerate(tree["services"].values()):
        assert service["environment"] == {"NODE_RANK": str(number), "MASTER_ADDR": "node0"}
        assert service["command"][:2] == ["pretrain", "configs/tiny_cpu.yaml"]
        assert service["command"][-2:] == ["runs_dir=/runs", "data.cache_dir=/cache"]
        assert (service["stop_signal"], service["stop_grace_period"]) == ("SIGTERM", "10m")
        assert "deploy" not in service
    assert tree["networks"] == {"nodes": {"internal": True}}


def test_gpus_of_one_machine() -> None:
    (service,) = parsed(render("configs/small_8gpu.yaml", "cluster.interface=ib0"))["services"].values()
    assert service["command"][-1] == "cluster.interface=null"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 8, "capabilities": ["gpu"]}
    assert service["ulimits"] == {"nofile": 16384, "memlock": -1}
    assert service["image"] == "${DSMOE_IMAGE:-dsmoe:cuda}"


def test_several_nodes_with_gpus_are_a_machine_each() -> None:
    rendered = render("configs/mixtral_8x7b.yaml", "cluster.interface=ib0")
    tree = parsed(rendered)
    (service,) = tree["services"].values()
    assert service["network_mode"] == "host"
    assert "cluster.interface=null" not in service["command"]
    needed = set(re.findall(r"\$\{(\w+):\?", rendered.files["compose.yaml"]))
    assert needed == set(re.findall(r"(\w+)=", rendered.command)) == {"NODE_RANK", "MASTER_ADDR", "SHARED", "USER_ID"}
    assert not tree.keys() & {"networks", "volumes"}


def test_text_from_the_hub_needs_the_outside(tmp_path: Path) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text(
        f"include: [{REPOSITORY}/configs/tiny_cpu.yaml]\ndata:\n  sources: [{{name: stories, hub: a/stories}}]\n",
        encoding="utf-8",
    )
    tree = parsed(render(str(path)))
    assert tree["networks"] == {"nodes": {"internal": False}}
    assert tree["services"]["node0"]["environment"]["HF_HOME"] == "/cache/huggingface"


def test_containers_see_the_files_that_the_config_names(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    text = f"include: [{REPOSITORY}/configs/tiny_cpu.yaml]\nname: Own.1\n"
    path.write_text(text + "data:\n  sources: [{name: own, path: /corpus/part_*/a.txt}]\n", encoding="utf-8")
    tree = parsed(render(str(path), "checkpoint.weights_from=runs/a$b/step_1"))
    service = tree["services"]["node0"]
    assert tree["name"] == "own-1"
    included = [f"{REPOSITORY}/configs/{name}.yaml" for name in ("tiny_cpu", "cluster/cpu_1x2")]
    assert service["volumes"][3:] == [f"{name}:{name}:ro" for name in sorted(["/corpus", str(path), *included])]
    assert "checkpoint.weights_from=runs/a$$b/step_1" in service["command"]  # compose makes one of two
    path.write_text(text + "data:\n  sources: [{name: own, path: ../corpus.txt}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.sources \(own\) \(../corpus.txt\) is outside of this folder.*absolute"):
        render(str(path))
    path.write_text(text + "data:\n  sources: [{name: own, path: /a:b/corpus.txt}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.sources \(own\) \(/a:b/corpus.txt\) has a colon"):
        render(str(path))


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_the_kubernetes_manifest_fits_its_schema(version: str) -> None:
    service, job = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text(encoding="utf-8"))
    for resource in (service, job):
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_kubernetes_manifest_is_of_its_config_and_of_the_image() -> None:
    service, manifest = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text(encoding="utf-8"))
    spec = manifest["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    name = manifest["metadata"]["name"]
    program, path, *overrides = container["args"]
    assert program == "pretrain"
    config = load_config(REPOSITORY / path, overrides)
    assert spec["completions"] == spec["parallelism"] == config.cluster.nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.cluster.devices_per_node
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["securityContext"]["runAsUser"] == int(
        re.findall(r"^USER (\d+):", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[0]
    )
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {config.runs_dir, config.data.cache_dir, "/dev/shm"} <= mounted
    ranks = rank_environments(config, {**variables(container), "JOB_COMPLETION_INDEX": "7"})
    assert [rank["RANK"] for rank in ranks] == [str(rank) for rank in range(56, 64)]
    assert ranks[0]["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    entry = runpy.run_path(str(DOCKER / "entrypoint.py"))
    assert codes == {"FailJob": [entry["USER_ERROR"]], "Ignore": [entry["STOPPED"]]}


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_what_stands_for_a_compiler_hands_out_tritons_module_only(tmp_path: Path) -> None:
    (tmp_path / "cuda_utils.so").write_text("made before", encoding="utf-8")
    script = tmp_path / "cc"
    script.write_text(
        (DOCKER / "no_compiler").read_text(encoding="utf-8").replace("/opt/triton", str(tmp_path)), encoding="utf-8"
    )
    script.chmod(0o755)
    made = tmp_path / "cuda_utils.cpython-312-x86_64-linux-gnu.so"
    subprocess.run([script, "driver.c", "-O3", "-shared", "-o", made, "-l:libcuda.so.1"], check=True)
    assert made.read_text(encoding="utf-8") == "made before"
    done = subprocess.run(
        [script, "a.c", "-o", "cpu_adam.so"], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no compiler in this image: cpu_adam.so cannot be built")
