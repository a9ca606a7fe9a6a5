"""Hosts: a run over ssh, as the hostfile of `deepspeed` and the environment that it takes to the hosts."""

from __future__ import annotations

import io
import os
import re
import sys
from codecs import BOM_UTF8
from collections import Counter
from pathlib import Path

from dsmoe.config.errors import Problem, UserError
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import show_value
from dsmoe.launch.job import Job, Request
from dsmoe.launch.quoting import environment_value, host_name, path_argument, shell_word, ssh_path
from dsmoe.plan.elastic import settings_for
from dsmoe.plan.text import first_and_last, quantity
from dsmoe.runtime.nodelist import MAX_HOSTS, expand_nodelist

HOSTFILE, ENVIRONMENT = "hostfile", "deepspeed_env"
_LINE = re.compile(r"([^\s-]\S*)\s+slots=([0-9]{1,9})(?:\s.*)?")
_MOST_BYTES = 1 << 24
"""The largest hostfile to read: more than the hosts of any cluster need."""

_OF_HOST = ("HOME", "HOSTNAME", "LOGNAME", "PATH", "PWD", "SHELL", "USER")
"""Variables that every host sets itself, so that they are not exported."""

PLACEHOLDERS = """\
# THESE NAMES ARE PLACEHOLDERS: put those of your hosts here, or into the config as cluster.hosts and write this again.
#
"""

OVER_SSH = """\
# Start it on one of these hosts, in a folder that all of them share:
#
#     {command}
#
# It reaches the others by ssh, which must not ask for a password. That a host is gone is noticed with these lines in
# ~/.ssh/config:
#
#     Host *
#         ServerAliveInterval 5
#         ServerAliveCountMax 2
#
# Without ssh, in the same folder, one of these on each host. K is 0 on the first of them, 1 on the next, and so on:
#
#     {no_ssh}
#     {torchrun}
#
# {environment}, beside this file, is what ssh takes to the hosts, in place of ~/.deepspeed_env: the path to this
# Python's programs, and the variables that paths of the config have. DeepSpeed takes PYTHONPATH by itself, and what
# begins with NCCL_ where it sees a GPU. A comment or an empty line in that file would break its command.
#
# Hosts on several networks: with cluster.interface=NAME in the config, NCCL and gloo use that one.
#
"""

ON_ONE_HOST = """\
# Start it on this host with one of
#
#     {no_ssh}
#     {torchrun}
#
"""


def job(request: Request) -> Job:
    """Return a file of environment variables, and a hostfile unless the config names one that DeepSpeed can read.

    Raises:
        UserError: the config's hosts are not `cluster.nodes` different ones, with `cluster.devices_per_node` each.
    """
    cluster = request.config.cluster
    named = hosts_of(request.config)
    path, is_ours = request.path_of(HOSTFILE), True
    if cluster.hostfile is not None and not _has_mark(cluster.hostfile):
        is_ours = False
        path = shell_word(path_argument(cluster.hostfile), "cluster.hostfile")
    names = named or _placeholders(request.config)
    commands = _commands(request, path, names[0])
    files = {ENVIRONMENT: _environment(request)} if cluster.nodes > 1 else {}
    if is_ours:
        files = {HOSTFILE: _hostfile(request, names, commands, placeholders=not named), **files}
    if cluster.nodes == 1:
        return Job(files, commands["no_ssh"])
    warnings = _pasted_with_a_space(request)
    if not named:
        warnings.append(f"the names in {path} are placeholders: put those of your hosts there, or set cluster.hosts")
    return Job(files, commands["command"], warning="\n".join(warnings))


def _pasted_with_a_space(request: Request) -> list[str]:
    """Warn of paths with a space, which DeepSpeed pastes bare into the shells of the hosts, as two words.

    Not an error, because the files start the run without ssh as well, where such paths do no harm.

    Raises:
        UserError: a shell would take part of a path for code.
    """
    paths = {
        "Python": sys.executable,
        "dsmoe's launch/pretrain.py": request.words("pretrain")[0],
        "this folder": os.getcwd(),  # DeepSpeed changes to it on every host
    }
    found = [f"{what} ({ssh_path(path, f'the path of {what}')})" for what, path in paths.items()]
    split = [text for text, path in zip(found, paths.values(), strict=True) if " " in path]
    if not split:
        return []
    return [
        f"a space is in the path of {' and of '.join(split)}, which DeepSpeed does not quote for the shells of the "
        "hosts: the command below starts no rank. Use paths without one, or start the run without ssh, on each host, "
        "with --no_ssh or torchrun (docs/clusters.md)"
    ]


def host_problems(config: Config) -> list[Problem]:
    """Return the problems of a config's hosts, for `dsmoe config check`, which finds a missing file itself."""
    hostfile = None
    try:
        hostfile = config.cluster.hostfile
        if hostfile is None or os.access(hostfile, os.R_OK):
            hosts_of(config)
    except InvalidKeyError:
        pass  # the section itself is wrong
    except UserError as error:
        key = "cluster.hosts" if hostfile is None else "cluster.hostfile"
        return [(key, line) for line in str(error).splitlines()]
    return []


def hosts_of(config: Config) -> list[str]:
    """Return the hosts in `cluster.hosts` or `cluster.hostfile`; none if neither is set.

    Raises:
        UserError: they are not `cluster.nodes` different hosts, with `cluster.devices_per_node` each.
    """
    cluster = config.cluster
    if cluster.hostfile is not None and cluster.hosts is not None:
        raise UserError("cluster.hosts and cluster.hostfile both say which hosts there are; set one of them to null")
    return named_hosts(config) if cluster.hostfile is None else _read_hostfile(config, cluster.hostfile)


def named_hosts(config: Config) -> list[str]:
    """Return the hosts in `cluster.hosts`; none if it is not set.

    Raises:
        UserError: they are not `cluster.nodes` different hosts.
    """
    cluster = config.cluster
    if cluster.hosts is None:
        return []
    try:
        names = expand_nodelist(cluster.hosts)
    except UserError as error:
        raise UserError(f"cluster.hosts: {error}") from None
    twice = [name for name, count in Counter(names).items() if count > 1]
    problems = [f"cluster.hosts names {', '.join(twice)} more than once; every host is one node"] if twice else []
    if len(set(names)) != cluster.nodes and (not twice or len(names) != cluster.nodes):
        problems.append(
            f"cluster.hosts names {quantity(len(set(names)), 'host')} and cluster.nodes is {cluster.nodes}; "
            f"{_with_nodes(config, len(set(names)))}, or name {cluster.nodes}"
        )
    if problems:
        raise UserError("\n".join(problems))
    return names


def _with_nodes(config: Config, nodes: int) -> str:
    """The advice that sets the config to another number of nodes, or the reasons why it cannot have that."""
    settings, others = settings_for(config, nodes, config.cluster.devices_per_node)
    if others:
        return f"{quantity(nodes, 'node')} cannot train it as it is ({'; '.join(others)})"
    return f"set {' '.join(setting for setting in settings if not setting.startswith('cluster.devices_per_node='))}"


def _has_mark(name: str) -> bool:
    """Return whether a file begins with a byte order mark: DeepSpeed would take that for part of a host's name."""
    try:
        with Path(name).open("rb") as stream:
            return stream.read(len(BOM_UTF8)) == BOM_UTF8
    except (OSError, ValueError):
        return False  # reading the file raises the error


def _lines(name: str) -> list[str]:
    """A hostfile's lines, which end at line breaks of files only, and not at all that `str.splitlines` knows."""
    what = f"cluster.hostfile ({name})"
    try:
        if os.path.exists(name) and not Path(name).is_file():  # reading a pipe may block for ever
            raise UserError(f"{what} is not a file")
        with Path(name).open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{what} cannot be read: {reason}") from None
    if len(data) > _MOST_BYTES:
        raise UserError(f"{what} has more than {_MOST_BYTES:,} bytes: it is no hostfile")
    return [line.strip() for line in io.StringIO(text, newline=None)]


def _read_hostfile(config: Config, name: str) -> list[str]:
    """Read a hostfile as DeepSpeed does, and check that it has the config's nodes and devices."""
    slots: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(_lines(name), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{name}:{number}: expected `HOST slots=DEVICES`, got {show_value(line)}")
        elif match[1] in slots:
            problems.append(f"{name}:{number}: {match[1]} is named a second time; every host is one node")
        else:
            slots[match[1]] = int(match[2])
            try:
                host_name(match[1], f"{name}:{number}")
            except UserError as error:
                problems.append(str(error))
    nodes, devices = config.cluster.nodes, config.cluster.devices_per_node
    if not slots and not problems:
        problems.append(
            f"cluster.hostfile ({name}) names no host; have {quantity(nodes, 'line')} `HOST slots={devices}` in the "
            "file, or set cluster.hostfile=null"
        )
    elif len(slots) > MAX_HOSTS:
        problems.append(f"cluster.hostfile ({name}) has more than {MAX_HOSTS:,} hosts; is it the right file?")
    elif len(slots) != nodes and not problems:
        ways = [_with_nodes(config, len(slots)), f"have {quantity(nodes, 'line')} in the file"]
        problems.append(
            f"cluster.hostfile ({name}) has {quantity(len(slots), 'host')} and cluster.nodes is {nodes}; "
            f"{', or '.join(ways)}"
        )
    others = [f"{host} slots={count}" for host, count in slots.items() if count != devices]
    if others:
        problems.append(
            f"cluster.hostfile ({name}): {', '.join(first_and_last(others))}, and cluster.devices_per_node is "
            f"{devices}; every node has equally many: write slots={devices}, or set cluster.devices_per_node"
        )
    if problems:
        raise UserError("\n".join(first_and_last(problems)))
    return list(slots)


def _placeholders(config: Config) -> list[str]:
    nodes = config.cluster.nodes
    if nodes == 1:
        return ["localhost"]
    width = max(2, len(str(nodes)))
    return [f"node{number:0{width}d}" for number in range(1, nodes + 1)]


def _commands(request: Request, hostfile: str, first: str) -> dict[str, str]:
    """The commands to type, by their names in the heading."""
    cluster = request.config.cluster
    over_ssh = request.program_over_ssh() if cluster.nodes > 1 else request.program()
    address = f"--master_addr {first} --node_rank {'0' if cluster.nodes == 1 else 'K'}"
    size = f"--nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node}"
    return {
        "command": f"DS_ENV_FILE={request.path_of(ENVIRONMENT)} deepspeed --hostfile {hostfile} {over_ssh}",
        "no_ssh": f"deepspeed --hostfile {hostfile} --no_ssh {address} {request.program()}",
        "torchrun": f"torchrun {size} {address.replace('_', '-')} {request.program()}",
    }


def _hostfile(request: Request, names: list[str], commands: dict[str, str], placeholders: bool) -> str:
    config = request.config
    written = f"# {request.plan.headline}\n# Written by `{request.written_by('--hostfile')}`.\n"
    how = (OVER_SSH if len(names) > 1 else ON_ONE_HOST).format(**commands, environment=ENVIRONMENT)
    to_edit = PLACEHOLDERS if len(names) > 1 and placeholders else ""
    slots = "".join(f"{name} slots={config.cluster.devices_per_node}\n" for name in names)
    return f"{written}#\n{to_edit}{how}{slots}"


def _environment(request: Request) -> str:
    """The variables that DeepSpeed exports on every host, in double quotes: this Python's PATH before the host's.

    Paths of the config are expanded on every host: the variables in them are exported as well.
    """
    accelerator = "DS_ACCELERATOR=cpu\n" if request.plan.is_on_cpu else ""
    programs = environment_value(f"{sys.prefix}/bin", "the folder of this Python")
    variables = [name for name in request.variables() if name in os.environ and name not in _OF_HOST]
    exports = [f"{name}={environment_value(os.environ[name], f'the variable {name}')}\n" for name in variables]
    return f"PATH={programs}:$PATH\n{accelerator}{''.join(exports)}"
