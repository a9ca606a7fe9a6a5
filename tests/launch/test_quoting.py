"""Hostile text in everything that `dsmoe launch` writes or prints: it arrives as it is, or is refused; none of it runs.

What is written is executed or parsed by what will read it: bash, YAML, DeepSpeed's own parsers and its own quoting.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import stat
import string
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import MultiNodeRunner, PDSHRunner

from dsmoe.config import UserError, load_config
from dsmoe.config.paths import literal_path
from dsmoe.config.yaml_text import Node, parse_yaml, plain, write_yaml
from dsmoe.launch import docker, hosts, quoting, slurm
from dsmoe.launch.job import Job, Request
from dsmoe.plan.plan import Plan
from tests.helpers.recipes import VALID

WAYS = {"hostfile": hosts, "slurm": slurm, "docker": docker}
HOSTILE = [
    *("a\nb", "a\ntouch ran\n", "\n#SBATCH --wrap=touch\n", "a\r\nb", "a\tb", "$(touch ran)", "`touch ran`"),
    *("'; touch ran; '", '"; touch ran; "', "'$(touch ran)'", "a && touch ran", "a & touch ran &", "a|touch ran"),
    *("a #b", "a: b", "- a", "a,b", "{a,b}", "[x]", "!ref", "&a *a", "? a", "%YAML 1.1", "%j-%N %n %h %%", "100%"),
    *(
        "$HOME",
        "${HOME}",
        "$$",
        "${X:?y}",
        "$PWD:/x",
        "\\",
        "a\\nb",
        "a\\",
        "'",
        '"',
        '"a',
        "a'b",
        "'''",
        "a  b ",
        " a",
    ),
    *("🙂", "é", "日本", "\u2028a\u2029", "a\u0085b", "\ufeffa", "\x1b[31mred", "\x7f", "\xa0", "\u202eabc", "a\0b"),
    *("-x", "--out", "-", "~", "~root", "*", "?", "> out", "< in", "(a)", "a;", "null", "true", "1e3", "0x10", "<<"),
]
FRAGMENTS = [*HOSTILE, "a", "b", "/", ".", "=", ":", " ", "\n", "$", "touch ran", "\\\n", "\udcff"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, with stubs of all commands that write down what they are given."""
    (tmp_path / "bin").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    for name in (
        "deepspeed",
        "torchrun",
        "sbatch",
        "srun",
        "python",
        "python3",
        "squeue",
        "scontrol",
        "flock",
        "docker",
    ):
        stub = tmp_path / "bin" / name
        stub.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$SEEN"\nprintf "\\0" >> "$SEEN"\n', encoding="utf-8"
        )
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho COMPLETING\n", encoding="utf-8")
    monkeypatch.chdir(work)
    return tmp_path


def bash(root: Path, script: str) -> list[list[str]]:
    """Run a script, and return the commands that it started; nothing else may have come of it."""
    (root / "seen").write_bytes(b"")
    before = names(root / "work")
    environment = {
        "PATH": f"{root / 'bin'}:/usr/bin:/bin",
        "SEEN": str(root / "seen"),
        "HOME": "/nowhere",
        **{"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=root / "work", env=environment, capture_output=True, timeout=60, check=False
    )
    assert b"syntax error" not in done.stderr, done.stderr
    assert b"command not found" not in done.stderr, done.stderr
    assert all(name.startswith("runs") for name in names(root / "work") - before), done.stderr
    calls = (root / "seen").read_bytes().decode("utf-8", "surrogateescape").split("\0\0")
    return [call.split("\0") for call in calls if call]


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def job(way: str, path: str, overrides: Sequence[str] = (), out: str = "out", **sections: Any) -> Job:
    """The job of a config at `path`, whose sections have `sections` on top; each as a whole where it is no mapping."""
    tree = plain(parse_yaml(VALID, str, []) or Node(None, ""))
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    Path(path).write_text(write_yaml(tree), encoding="utf-8")
    config = load_config(path, overrides)
    return WAYS[way].job(Request(Plan.from_config(config), path, tuple(overrides), out))


def check(way: str, written: Job, root: Path, path: str, overrides: Sequence[str], out: str = "out") -> None:
    """Read or run everything that was written; the program must get `path` and `overrides` as they were typed."""
    path = f"./{path}" if path.startswith("-") else path
    program = ["--config", path, *overrides]
    if way == "docker":
        check_compose(written, root, [path, *overrides])
    elif way == "slurm":
        for text in written.files.values():
            check_options(text)
        script = "".join(f"(\n{text}\n)\n" for text in (*written.files.values(), written.command))
        *calls, last = bash(root, script)
        assert [call[call.index("--config") :] for call in calls if "--config" in call] == [program, program]
        assert last == ["sbatch", in_folder(out, "pretrain.sbatch")]
    else:
        lines = written.files["hostfile"].split("\n")
        assert runner._parse_hostfile(lines) == {"node01": 4, "node02": 4}
        commands = [
            line[1:].strip() for line in lines if re.match(r"# +(DS_ENV_FILE=\S* )?(deepspeed|torchrun) ", line)
        ]
        commands += [line[1:].strip() for line in lines if line.startswith("#     DS_ENV_FILE=")]
        assert len(commands) >= 3
        calls = bash(root, "\n".join([written.command, *commands]))
        assert len(calls) == 1 + len(commands)
        for call in calls:
            assert call[-len(program) :] == program
            if "--hostfile" in call:
                assert call[call.index("--hostfile") + 1] == in_folder(out, "hostfile")
        check_remote(calls[0], program)


def in_folder(out: str, name: str) -> str:
    path = str(Path(out) / name)
    return f"./{path}" if path.startswith("-") else path


def check_remote(call: list[str], program: list[str]) -> None:
    """Check the words that DeepSpeed gives to pdsh, and that a host's shell then reads."""
    script = call.index("--config") - 1
    words = PDSHRunner.parse_user_args(SimpleNamespace(args=SimpleNamespace(user_args=call[script + 1 :])))  # type: ignore[arg-type]
    assert not any("%" in word for word in words)
    remote = subprocess.run(
        ["bash", "-c", " ".join(["printf '%s\\0'", *words])], cwd="/proc/self", capture_output=True, check=True
    )
    assert remote.stdout.decode().split("\0")[:-1] == program


def check_options(text: str) -> None:
    options = {line for line in re.split("[\n]", text) if line.startswith("#SBATCH")}
    assert {line.split()[1].partition("=")[0] for line in options} <= {
        *(
            "--partition",
            "--job-name",
            "--nodes",
            "--ntasks-per-node",
            "--gpus-per-node",
            "--exclusive",
            "--mem",
            "--time",
        ),
        *("--signal", "--requeue", "--no-requeue", "--open-mode", "--dependency", "--output"),
    }


def check_compose(written: Job, root: Path, arguments: list[str]) -> None:
    text = written.files["compose.yaml"]
    tree = yaml.safe_load(text)
    assert set(tree) == {"name", "x-node", "services", "networks", "volumes"} - ({"networks", "volumes"} - set(tree))
    command = [interpolated(word) for word in tree["x-node"]["command"]]
    assert command[: len(arguments) + 1] == ["pretrain", *arguments]
    assert command[len(arguments) + 1 :][:2] == ["runs_dir=/runs", "data.cache_dir=/cache"]
    for volume in tree["x-node"]["volumes"]:
        assert len(interpolated(volume).split(":")) <= 3
    (call,) = bash(root, f"{written.command} </dev/null")
    assert call[:2] == ["docker", "compose"]


def interpolated(text: str) -> str:
    """As compose does; it refuses any other dollar sign."""
    assert "$" not in re.sub(r"\$\$|\$\{PWD\}|\$\{SHARED:\?[^}]*\}", "", text)
    return text.replace("$$", "$")


def refused_or(way: str, root: Path, path: str, overrides: Sequence[str], out: str = "out", **sections: Any) -> bool:
    """Return whether it was refused, in one message and with nothing written."""
    try:
        written = job(way, path, overrides, out, **sections)
    except UserError as error:
        message = str(error)
    else:
        check(way, written, root, path, overrides, out)
        return False
    assert "optimizer" not in message  # the rest of the config is right
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_the_configs_path(way: str, text: str, root: Path) -> None:
    if "/" in text or "\0" in text:
        pytest.skip("no name of a file")
    refused = refused_or(way, root, f"{text}.yaml", ["cluster.nodes=2"])
    assert not (refused and way in ("slurm", "docker"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_an_override(way: str, text: str, root: Path) -> None:
    """In YAML's single quotes, which have no escapes: the text is in the override as it is."""
    keys = ("data.tokenizer", "data.sources.0.text_field", "checkpoint.resume")
    quoted = text.replace("'", "''")
    refused_or(way, root, "run.yaml", [f"{keys[HOSTILE.index(text) % len(keys)]}='x{quoted}'"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_a_value_and_in_the_folder(way: str, text: str, root: Path) -> None:
    absolute = f"/{text}/x"
    sections = {
        "runs_dir": f"runs/{text}" if not text.startswith("-") else f"runs{text}",
        "data": {"tokenizer": absolute, "cache_dir": text, "sources": [{"name": "a", "path": absolute}]},
        "checkpoint": {"weights_from": absolute},
    }
    refused = refused_or(way, root, "run.yaml", [], **sections)
    # A null character is in no path; a colon separates compose's, and .. leads out of what containers see.
    if refused:
        assert "\0" in text or (way, ":" in text) == ("docker", True) or (way, "\\" in text) == ("slurm", True)
    if "\0" not in text and text not in ("", "-"):
        assert not refused_or(way, root, "run.yaml", [], out=text.strip() or "out")


def test_the_run_folder_of_a_job_script_is_the_configs(root: Path) -> None:
    for text in HOSTILE:
        if "\0" in text or "\\" in text:
            continue
        written = job("slurm", "run.yaml", runs_dir=text)
        runs_dir = load_config("run.yaml").runs_dir
        calls = bash(
            root, 'mkdir() { printf \'%s\\0\' mkdir "$@" >> "$SEEN"; exit; }\n' + written.files["pretrain.sbatch"]
        )
        (call,) = [call for call in calls if call[0] == "mkdir"]
        made = call[-1] if call[-1] else call[-2]
        assert os.path.normpath(made) == os.path.normpath(f"{runs_dir}/tiny/logs")


@pytest.mark.parametrize(
    "name", ["$(touch ran)", "a;touch", "`id`", "a'b", 'a"b', "a\\b", "é", "a%n", "-oProxyCommand=x"]
)
def test_a_hostfiles_host_that_is_no_name_is_refused_with_its_line(name: str, root: Path) -> None:
    Path("hosts").write_text(f"# ours\nnode01 slots=4\n{name} slots=4\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"hosts:3"):
        job("hostfile", "run.yaml", ["cluster.hostfile=hosts"])


def test_a_byte_order_mark_is_not_part_of_the_first_hosts_name(root: Path) -> None:
    """Neither here nor for DeepSpeed, which does not know such marks: it gets a hostfile without."""
    Path("hosts").write_text("\ufeffgpu1 slots=4\r\ngpu2 slots=4\r\n", encoding="utf-8")
    written = job("hostfile", "run.yaml", ["cluster.hostfile=hosts"])
    assert runner._parse_hostfile(written.files["hostfile"].split("\n")) == {"gpu1": 4, "gpu2": 4}
    (call,) = bash(root, written.command)
    assert call[call.index("--hostfile") + 1] == "out/hostfile"
    assert "PLACEHOLDERS" not in written.files["hostfile"]


def test_a_hostfile_of_any_name_is_used(root: Path) -> None:
    for text in HOSTILE:
        if "\0" in text or "/" in text:
            continue
        Path(text).write_text("node01 slots=4\nnode02 slots=4\n", encoding="utf-8")
        written = job("hostfile", "run.yaml", cluster={"hostfile": literal_path(text)})
        (call,) = bash(root, written.command)
        used = call[call.index("--hostfile") + 1]
        assert Path(used) == Path(text)
        assert not used.startswith("-")
        Path(text).unlink()


@pytest.mark.parametrize("text", HOSTILE)
def test_the_folder_of_this_python_reaches_the_hosts(text: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", f"/opt/{text}/venv")
    try:
        written = job("hostfile", "run.yaml")
    except UserError as error:
        message = str(error)
    else:
        check_environment(written.files["deepspeed_env"], f"/opt/{text}/venv/bin:/bin", root)
        return
    assert "the folder of this Python" in message
    assert re.search("[%\0\r\n]", text)


def check_environment(text: str, path: str, root: Path) -> None:
    (root / "env").write_text(text, encoding="utf-8")
    held = SimpleNamespace(exports={})
    for line in (root / "env").open(encoding="utf-8"):
        MultiNodeRunner.add_export(held, *line.split("=", maxsplit=1))  # type: ignore[arg-type]
    exports = "".join(f"export {key}={value}; " for key, value in held.exports.items())
    done = subprocess.run(
        ["bash", "-c", f'{exports}printf %s "$PATH"'], env={"PATH": "/bin"}, capture_output=True, check=True
    )
    assert done.stdout.decode() == path


def in_a_container(written: Job, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that the command of a compose file gives, in the environment of somebody else."""
    command = [interpolated(word) for word in yaml.safe_load(written.files["compose.yaml"])["x-node"]["command"]]
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("CORPORA")
    return load_config(command[1], command[2:])


@pytest.mark.parametrize("is_override", [True, False])
def test_a_path_of_this_hosts_user_and_variables_is_the_same_in_a_container(
    is_override: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPORA", "/big/a $x 'b'")
    paths = {"data.tokenizer": "~/tok.json", "checkpoint.weights_from": "${HOME}/old", "data.sources.0.path": "a$$b"}
    paths |= {"data.sources.1.path": "$CORPORA/*.txt", "data.cache_dir": "~/cache", "runs_dir": "$HOME/runs"}
    if is_override:
        written = job("docker", "run.yaml", [f"{key}={path}" for key, path in paths.items()])
    else:
        tree = plain(parse_yaml(VALID, str, []) or Node(None, ""))
        data = {"tokenizer": paths["data.tokenizer"], "cache_dir": paths["data.cache_dir"]}
        data["sources"] = [
            {"name": s["name"], "path": paths[f"data.sources.{i}.path"]} for i, s in enumerate(tree["data"]["sources"])
        ]
        checkpoint = {"weights_from": paths["checkpoint.weights_from"]}
        written = job("docker", "run.yaml", data=data, checkpoint=checkpoint, runs_dir=paths["runs_dir"])
    config = in_a_container(written, monkeypatch)
    assert config.data.tokenizer == "/home/me/tok.json"
    assert config.checkpoint.weights_from == "/home/me/old"
    assert [source.path for source in config.data.sources] == ["a$b", "/big/a $x 'b'/*.txt"]
    assert (config.runs_dir, config.data.cache_dir) == ("/runs", "/cache")
    volumes = [interpolated(volume) for volume in yaml.safe_load(written.files["compose.yaml"])["x-node"]["volumes"]]
    assert "/home/me/tok.json:/home/me/tok.json:ro" in volumes


@pytest.mark.parametrize("text", ["~/base.yaml", "$HOME/base.yaml"])
def test_an_include_of_this_hosts_user_is_refused_for_containers(
    text: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root))
    (root / "base.yaml").write_text(VALID, encoding="utf-8")
    Path("run.yaml").write_text(f"include: {text}\n", encoding="utf-8")
    request = Request(Plan.from_config(load_config("run.yaml")), "run.yaml", (), "out")
    with pytest.raises(UserError, match=re.escape(f"include ({text}) is {root}/base.yaml here")):
        docker.job(request)
    assert hosts.job(request).files


def test_variables_of_paths_go_to_the_hosts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ssh takes none of this shell's; HOME and the like are each host's own."""
    monkeypatch.setenv("CORPORA", '/big/a "$x" `y`')
    monkeypatch.setenv("SOME", "base")
    data = {"sources": [{"name": "a", "path": "$CORPORA/${HOME}/$NOT_SET/x.txt"}], "cache_dir": "${CORPORA}/cache"}
    Path("base.yaml").write_text(VALID, encoding="utf-8")
    written = job("hostfile", "run.yaml", data=data, include="$SOME.yaml")
    (root / "env").write_text(written.files["deepspeed_env"], encoding="utf-8")
    held = SimpleNamespace(exports={})
    for line in (root / "env").open(encoding="utf-8"):
        MultiNodeRunner.add_export(held, *line.split("=", maxsplit=1))  # type: ignore[arg-type]
    assert {key.strip() for key in held.exports} - {"DS_ACCELERATOR"} == {"PATH", "CORPORA", "SOME"}
    exports = "".join(f"export {key}={value}; " for key, value in held.exports.items())
    done = subprocess.run(["bash", "-c", f'{exports}printf %s "$CORPORA"'], capture_output=True, check=True)
    assert done.stdout.decode() == '/big/a "$x" `y`'


def test_every_sign_that_is_not_refused_reaches_the_hosts_as_it_is(tmp_path: Path) -> None:
    """Each by itself: among others, some of them would be quoted or refused for theirs."""
    signs = [*string.punctuation, *string.whitespace, "\0", "\x1b", "é", "🙂"]
    texts = [before + sign + after for sign in signs for before in ("", "a", "a ") for after in ("", "b", " b")]
    accepted = []
    for text in texts:
        with suppress(UserError):
            accepted.append(quoting.ssh_word(text, "x"))
    assert {text[1] for text in accepted if len(text) == 3} >= {*"._-+=@:,/*?[]é🙂"}
    words = PDSHRunner.parse_user_args(SimpleNamespace(args=SimpleNamespace(user_args=accepted)))  # type: ignore[arg-type]
    command = " ".join(["printf '%s\\0'", *words])
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert done.stdout.decode().split("\0")[:-1] == accepted, done.stderr
    assert not os.listdir(tmp_path)


def test_an_override_to_paste_is_the_value_again() -> None:
    for text in (text for text in HOSTILE if "\0" not in text):
        shown = quoting.path_override("data.tokenizer", text)
        assert "\n" not in shown
        (word,) = decode(shown)
        tree = load_config(write_valid(), [word])
        assert tree.data.tokenizer in (text, f"./{text}")


def write_valid() -> str:
    path = Path(os.environ["PYTEST_TMP"]) / "valid.yaml"
    path.write_text(VALID, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


def decode(words: str) -> list[str]:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(FRAGMENTS, k=draw.randint(1, 6)))


@pytest.mark.parametrize("count", [150, pytest.param(20_000, marks=pytest.mark.fuzz)])
def test_any_text_is_one_word_of_a_shell_and_one_string_of_yaml(count: int) -> None:
    draw = random.Random(12)
    texts = [random_text(draw) for _ in range(count)]
    words, expected = [], []
    for text in texts:
        try:
            words.append(quoting.shell_word(text, "x"))
            expected.append(text)
        except UserError:
            assert "\0" in text
        try:
            assert yaml.safe_load(quoting.yaml_text(text, "x")) == text
            assert "\n" not in quoting.yaml_text(text, "x")
        except UserError:
            assert "\udcff" in text
    assert all(word.isprintable() for word in words)
    for start in range(0, len(words), 500):
        assert decode(" ".join(words[start : start + 500])) == expected[start : start + 500]
    assert [shlex.split(word) for word in words if not word.startswith("$'")] == [
        [text] for word, text in zip(words, expected, strict=True) if not word.startswith("$'")
    ]


@pytest.mark.parametrize("count", [25, pytest.param(1_500, marks=pytest.mark.fuzz)])
def test_fuzz_launch_text(count: int, root: Path) -> None:
    """Any text in any place: refused with one message, or right. A traceback, or a command that runs, fails it."""
    draw = random.Random(13)
    outcomes = {"tried": 0, "refused": 0}
    for _ in range(count):
        way, place = draw.choice(list(WAYS)), draw.choice(["path", "override", "value", "out"])
        text = random_text(draw)
        name = re.sub("[/\0]", "_", text)[:60]
        outcomes["tried"] += 1
        if place == "path":
            outcomes["refused"] += refused_or(way, root, f"{name}.yaml", [])
        elif place == "override":
            outcomes["refused"] += refused_or(way, root, "run.yaml", [f"data.tokenizer={text}"])
        elif place == "out":
            outcomes["refused"] += refused_or(way, root, "run.yaml", [], out=f"o{name}")
        elif "\udcff" not in text:
            data = {"tokenizer": f"/{text}", "sources": [{"name": "a", "path": f"/{text}"}]}
            outcomes["refused"] += refused_or(way, root, "run.yaml", [], runs_dir=f"runs/{text}", data=data)
    print(outcomes)
    assert 0 < outcomes["refused"] < outcomes["tried"]
