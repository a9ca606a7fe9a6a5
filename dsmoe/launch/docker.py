"""Docker: a run in containers, as a `compose.yaml` with a service per node of this machine, or one for any machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dsmoe.config.errors import UserError
from dsmoe.config.load import included_files
from dsmoe.config.paths import depends_on_host
from dsmoe.config.schema import Config
from dsmoe.exit_codes import STOPPED
from dsmoe.launch.job import Job, Request
from dsmoe.launch.quoting import compose_text, path_argument, path_assignment

ON_A_MACHINE = 'NODE_RANK=0 MASTER_ADDR="$(hostname)" SHARED=/shared USER_ID="$(id -u)"'
"""The variables to start machine 0 of several with; the others have their own NODE_RANK, and its name."""

_IN_CONTAINERS = {"runs_dir": "/runs", "data.cache_dir": "/cache"}
"""The folders that dsmoe makes, by their paths in containers."""

NODE = """\
x-node: &node
  image: ${{DSMOE_IMAGE:-{image}}}  # docker/Dockerfile makes it
  command: {command}
  volumes:
{volumes}
  shm_size: 8gb             # a limit: ranks of one node exchange data in shared memory
  ulimits:
{ulimits}
  stop_signal: SIGTERM      # the ranks save a checkpoint and exit with {stopped}
  stop_grace_period: 10m    # ... which may take so long
  restart: on-failure:5     # after a failure (not after a stop) it goes on from the newest checkpoint
"""

GPUS = """\
  deploy:
    resources:
      reservations:
        devices:
          - {{driver: nvidia, count: {count}, capabilities: [gpu]}}
"""

SERVICE = """\
  node{number}:
    <<: *node
    hostname: node{number}
    networks: [nodes]
    environment: {{NODE_RANK: "{number}", MASTER_ADDR: node0{variables}}}
"""

ONE_MACHINE = """\
services:
{services}
networks:
  nodes:
    internal: {internal}          # {reason}

volumes:                    # of all nodes
  runs:
  cache:
"""

MANY_MACHINES = """\
services:
  node:
    <<: *node
    user: ${{USER_ID:?who may write to the shared folder, as `id -u`}}
    network_mode: host      # NCCL needs the machine's own interfaces
    # With InfiniBand or RoCE:
    # devices: [/dev/infiniband]
    environment:
      NODE_RANK: ${{NODE_RANK:?which machine this is, 0 to {last}}}
      MASTER_ADDR: ${{MASTER_ADDR:?the name or address of machine 0}}
      TRITON_CACHE_DIR: /tmp/triton
{variables}"""


def job(request: Request) -> Job:
    """Return the compose file of a run.

    Nodes without GPUs, and a single node, are services on a network of this machine. Several nodes with GPUs are one
    machine each: the same file with one service, started on each of them.

    Raises:
        UserError: the config names a file outside the folder that the containers see.
    """
    config = request.config
    compose = f"docker compose --file {request.path_of('compose.yaml')}"
    is_cpu = request.plan.is_on_cpu
    one_machine = is_cpu or config.cluster.nodes == 1
    if one_machine:
        command, text = f"{compose} up", _services(config)
    else:
        command, text = f"{ON_A_MACHINE} {compose} up", _one_service(config)
    text = "\n".join([_heading(request, compose, command, one_machine), _node(request, is_cpu, one_machine), text])
    return Job(files={"compose.yaml": text}, command=command)


def _heading(request: Request, compose: str, command: str, one_machine: bool) -> str:
    config = request.config
    lines = [
        request.plan.headline,
        f"Written by `{request.written_by('--docker')}`.",
        "",
        "Start, in the folder from which that was run:",
        f"    {command}",
    ]
    if not one_machine:
        lines.append(f"on machine 0, and on each of the others with its NODE_RANK (to {config.cluster.nodes - 1}).")
        lines.append(
            "Once before, by that user: mkdir -p /shared/runs /shared/cache (else the engine makes them, as root's)"
        )
    results = f"{compose} cp node0:/runs/{config.name} ." if one_machine else f"$SHARED/runs/{config.name}"
    lines += ["Stop, with a checkpoint from which the same command goes on:", f"    {command.removesuffix('up')}stop"]
    lines += ["What it wrote:", f"    {results}"]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + f"name: {_project(config.name)}\n"


def _node(request: Request, is_cpu: bool, one_machine: bool) -> str:
    config = request.config
    command = ["pretrain", path_argument(request.path), *request.overrides]
    command += [f"{key}={folder}" for key, folder in _IN_CONTAINERS.items()]
    if one_machine and config.cluster.interface is not None:
        command.append("cluster.interface=null")  # containers have one of their own, and no others
    command += [
        path_assignment(key, path) for key, path in request.paths_of_host().items() if key not in _IN_CONTAINERS
    ]
    shared = "" if one_machine else "${SHARED:?a folder that every machine sees}/"
    volumes = ["${PWD}:/project:ro", f"{shared}runs:/runs", f"{shared}cache:/cache"]
    volumes += [compose_text(f"{path}:{path}:ro", "a path of the config") for path in _outside(request)]
    ulimits = ["nofile: 16384"] + ([] if is_cpu else ["memlock: -1             # NCCL pins memory"])
    text = NODE.format(
        stopped=STOPPED,
        image="dsmoe:cpu" if is_cpu else "dsmoe:cuda",
        command=f"[{', '.join(compose_text(word, 'an argument') for word in command)}]",
        volumes="\n".join(f"    - {volume}" for volume in volumes),
        ulimits="\n".join(f"    {limit}" for limit in ulimits),
    )
    return text if is_cpu else text + GPUS.format(count=config.cluster.devices_per_node)


def _services(config: Config) -> str:
    variables = "".join(f", {key}: {value}" for key, value in _variables(config).items())
    services = [SERVICE.format(number=number, variables=variables) for number in range(config.cluster.nodes)]
    internal = not _uses_hub(config)
    reason = "nothing outside is reached, or reaches them" if internal else "data.sources has some of the hub"
    return ONE_MACHINE.format(services="".join(services), internal=json.dumps(internal), reason=reason)


def _one_service(config: Config) -> str:
    variables = "".join(f"      {key}: {value}\n" for key, value in _variables(config).items())
    return MANY_MACHINES.format(last=config.cluster.nodes - 1, variables=variables)


def _variables(config: Config) -> dict[str, str]:
    return {"HF_HOME": "/cache/huggingface"} if _uses_hub(config) else {}


def _uses_hub(config: Config) -> bool:
    return any(source.hub for source in config.data.sources)


def _outside(request: Request) -> list[str]:
    """The absolute paths that the run reads, which are mounted at the same paths in containers."""
    config = request.config
    included = included_files(Path(request.path))
    paths = {f"a file of the config ({file})": str(file) for file in (request.path, *(file for _, file in included))}
    paths |= {"data.tokenizer": config.data.tokenizer}
    paths |= {f"data.sources ({source.name})": source.path for source in config.data.sources if source.path}
    paths |= {
        "checkpoint.weights_from": config.checkpoint.weights_from or "",
        "checkpoint.resume": config.checkpoint.resume,
    }
    problems = [
        f"include ({text}) is {file} here, and may be another file for the user and the environment of a container; "
        "write that path into the file that includes it"
        for text, file in included
        if depends_on_host(text)
    ]
    problems += [
        f"{key} ({path}) is outside of this folder, which is what containers see; run `dsmoe launch` in a folder above "
        "it, or give an absolute path"
        for key, path in paths.items()
        if ".." in Path(path).parts
    ]
    problems += [
        f"{key} ({path}) has a colon, which separates paths in a compose file; give it a name without"
        for key, path in paths.items()
        if path.startswith("/") and ":" in path
    ]
    if problems:
        raise UserError("\n".join(problems))
    return sorted({_before_wildcards(path) for path in paths.values() if path.startswith("/")})


def _before_wildcards(path: str) -> str:
    parts = Path(path).parts
    wild = next((index for index, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return str(Path(*parts[:wild]))


def _project(name: str) -> str:
    """The run's name, in the characters that compose allows."""
    return re.sub(r"[^a-z0-9_-]", "-", name.lower()).lstrip("_-") or "dsmoe"
