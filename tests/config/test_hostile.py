"""Hostile configs (YAML bombs, huge numbers, mutated text) give one clear error quickly, and never a traceback."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from dsmoe.cli import main
from dsmoe.config import ConfigError, UserError, dump_config, load_config
from dsmoe.config.schema import Config
from dsmoe.config.yaml_text import fewest_characters
from dsmoe.plan import Batch, Plan
from tests.helpers.recipes import VALID, problems_of, write

COMMANDS = (["config", "check"], ["config", "show"], ["plan"], ["launch", "--docker", "--dry-run"])


def aliases(levels: int) -> str:
    lines = ["  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return VALID + "deepspeed:\n" + "\n".join(lines) + "\n"


def keys(count: int, section: str = "") -> str:
    many = "".join(f"{'  ' * bool(section)}key{n}: 1\n" for n in range(count))
    return (
        VALID.replace(f"{section}:\n", f"{section}:\n{many}", 1)
        if section in VALID and section
        else VALID + section + many
    )


BOMBS = {
    "aliases": aliases(30),
    "unknown keys": keys(200_000),
    "fewer unknown keys": keys(4_000),
    "unknown keys of a section": keys(4_000, "moe"),
    "unknown keys of deepspeed": keys(4_000, "deepspeed:\n"),
    "one key many times": VALID + "a: 1\n" * 6_000,
    "many sources": VALID.replace("  sources:\n", "  sources:\n" + "    - {name: a}\n" * 3_000),
    "nested lists": VALID + "deepspeed: " + "[" * 30_000 + "]" * 30_000,
    "nested a little": VALID + "deepspeed: {a: " + "[" * 100 + "]" * 100 + "}",
    "one long word": VALID + "deepspeed: {a: " + "x" * 1_000_000 + "}",
    "a number of many digits": VALID + "deepspeed: {a: " + "9" * 50_000 + "}",
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_short_error(
    bomb: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(write(tmp_path, BOMBS[bomb]))]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err) < 60_000
    assert err.count("\n") <= 52


@pytest.mark.parametrize("wide", [True, False])
def test_files_that_include_each_other_twice_are_a_bomb(wide: bool, tmp_path: Path) -> None:
    for n in range(40):
        write(tmp_path, f"include: [{n + 1}.yaml, {n + 1}.yaml]\n", f"{n}.yaml")
    write(tmp_path, VALID, "40.yaml")
    if wide:
        write(tmp_path, f"include: [{', '.join(['40.yaml'] * 5_000)}]\n", "0.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "0.yaml")
    assert len(error.value.problems) == 1
    assert "no config is so long" in str(error.value)


def test_an_include_of_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/dev/zero is not a file"):
        load_config(write(tmp_path, f"include: /dev/zero\n{VALID}"))


def test_long_overrides_are_refused(tmp_path: Path) -> None:
    for overrides in (["data.tokenizer=" + "x" * 300_000], ["data.tokenizer=x"] * 20_000):
        with pytest.raises(ConfigError, match="no overrides are so long"):
            load_config(write(tmp_path, VALID), overrides)


def sources(count: int, entry: str) -> str:
    many = "".join(f"    - {entry.format(n)}\n" for n in range(count))
    return re.sub(r"  sources:\n(    .*\n)+", lambda _: f"  sources:\n{many}", VALID)


def test_a_loaded_config_is_readable_when_dumped(tmp_path: Path) -> None:
    """The dumped config, which a resume reads, is longer by the defaults."""
    entry = "{{name: source_{0:03d}, path: /data/corpora/web/part_{0:03d}/*.jsonl.zst, weight: 1.5, text_field: body}}"
    config = load_config(write(tmp_path, sources(400, entry)))
    dumped = dump_config(config)
    assert len(dumped) > 1 << 16
    assert load_config(write(tmp_path, dumped, "dumped.yaml")) == config


@pytest.mark.parametrize(
    "text",
    [
        sources(4_000, "{{name: s{0}, path: p{0}}}"),
        VALID + "deepspeed:\n  comms_logger:\n    prof_ops: [&a " + "x" * 20_000 + ", *a" * 15 + "]\n",
    ],
    ids=["many sources", "long aliases"],
)
def test_a_config_too_long_with_its_defaults_is_refused_with_a_remedy(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    (problem,) = error.value.problems
    assert "no config" in problem
    assert "one source can read many files (path: data/*.jsonl)" in problem


def test_the_files_of_a_config_that_is_too_long_are_not_looked_at(tmp_path: Path) -> None:
    """A thousand patterns take a second to check, so thousands are refused first."""
    looked: list[object] = []
    for count, is_looked_at in ((100, True), (1_900, False), (4_000, False)):
        text = sources(count, "{{name: s{0}, path: p{0}}}")
        with suppress(ConfigError):
            load_config(write(tmp_path, text), [], lambda config: looked.append(config) or [])
        assert bool(looked) == is_looked_at, count
        looked.clear()


def test_the_fewest_characters_are_never_more_than_are_written(tmp_path: Path) -> None:
    entry = "{{name: s{0}, path: '/data/{0}: [a]/*.jsonl'}}"
    for text in (
        VALID,
        sources(1, entry),
        sources(700, entry),
        sources(30, "{{name: s{0}, path: p, text_field: 'a\\nb'}}"),
    ):
        config = load_config(write(tmp_path, text))
        fewest, written = fewest_characters(config.model_dump()), len(dump_config(config))
        assert 0.8 * written < fewest <= written


def test_an_override_of_too_many_levels_is_refused(tmp_path: Path) -> None:
    for levels in (51, 5_000):
        with pytest.raises(ConfigError, match="no key has so many parts"):
            load_config(write(tmp_path, VALID), [f"deepspeed{'.a' * levels}=1"])


def leaves(schema: dict, definitions: dict, path: str = "") -> list[str]:  # type: ignore[type-arg]
    """Yield the dotted keys of all numbers in the schema."""
    found = []
    for name, child in schema.get("properties", {}).items():
        options = [child, *child.get("anyOf", [])]
        for option in options:
            reference = option.get("$ref", "").rpartition("/")[2]
            if reference and reference != "Device":
                found += leaves(definitions[reference], definitions, f"{path}{name}.")
            elif option.get("type") in ("integer", "number"):
                found.append(f"{path}{name}")
    return sorted(set(found))


SCHEMA = Config.model_json_schema()
NUMBERS = leaves(SCHEMA, SCHEMA["$defs"])


TEXTS = (
    *("cluster.interface", "cluster.hosts", "cluster.hostfile", "cluster.device", "data.tokenizer", "data.cache_dir"),
    *("data.end_of_document", "data.sources.0.path", "data.sources.0.hub", "data.sources.0.split", "runs_dir"),
    *("data.sources.0.text_field", "data.sources.0.name", "name", "checkpoint.resume", "checkpoint.weights_from"),
)


def test_no_key_takes_an_empty_text(tmp_path: Path) -> None:
    """An empty path, as from `$NAME` with NAME set to nothing, would be the working directory."""
    found = {key.removesuffix(".") for key in texts(SCHEMA, "")}
    assert found == {re.sub(r"\.0\.", ".", key) for key in TEXTS}
    for key in TEXTS:
        problems = problems_of(write(tmp_path, VALID), f"{key}=''")
        assert problems[0].startswith(f"{key}: expected "), problems
        assert 'got ""' in problems[0]


def texts(schema: dict, path: str) -> list[str]:  # type: ignore[type-arg]
    """Yield the dotted keys of all free texts in the schema."""
    found = []
    for name, child in schema.get("properties", {}).items():
        for option in (child, *child.get("anyOf", []), child.get("items", {})):
            reference = option.get("$ref", "").rpartition("/")[2]
            if reference:
                found += texts(SCHEMA["$defs"][reference], f"{path}{name}.")
            elif option.get("type") == "string" and "enum" not in option:
                found.append(f"{path}{name}")
    return found


def test_a_timeout_fits_what_counts_it(tmp_path: Path) -> None:
    """Milliseconds have 32 bits in torch's store and gloo, and timedelta has a limit as well."""
    (problem,) = problems_of(write(tmp_path, VALID), "cluster.collective_timeout_seconds=1e18")
    assert problem.startswith(
        "cluster.collective_timeout_seconds: expected a whole number >= 1 and <= 1e+06, got 1e+18"
    )
    config = load_config(write(tmp_path, VALID), ["cluster.collective_timeout_seconds=1e6"])
    assert timedelta(seconds=config.cluster.collective_timeout_seconds) < timedelta(milliseconds=2**31)


LONG = ["9" * 23, "9" * 310, "-" + "9" * 310, "9" * 5000, "1" + "0" * 309 + ".5"]
"""Whole numbers above the range of floats, and of more than the 4,300 digits that Python reads."""


@pytest.mark.parametrize("value", ["1e18", "1e300", *LONG, "65537", "1e-300", "-1", "0"])
def test_no_number_takes_long_or_ends_in_a_traceback(value: str, tmp_path: Path) -> None:
    assert len(NUMBERS) > 50
    path = write(tmp_path, VALID)
    for key in NUMBERS:
        outcome_of(path, [f"{key}={value}"])


def outcome_of(path: Path, overrides: list[str]) -> str:
    """Return what `config check`, `plan` and `launch` do with a config, short of printing: refused or planned."""
    try:
        config = load_config(path, overrides)
        Batch.from_config(config)
        plan = Plan.from_config(config)
        assert plan.text()
        assert plan.json()
    except UserError as error:
        message = str(error)
    else:
        return "planned"
    assert 0 < len(message) < 60_000
    return "refused"


def test_the_largest_cluster_is_planned(tmp_path: Path) -> None:
    size = ["cluster.nodes=100000", "cluster.devices_per_node=1024", "train.batch_tokens=52428800000"]
    assert outcome_of(write(tmp_path, VALID), size) == "planned"
    assert outcome_of(write(tmp_path, VALID), ["model.num_layers=10000"]) == "planned"


WORDS = [
    *(
        "null",
        "true",
        "1e18",
        "9" * 310,
        "-1",
        "0",
        "1.5",
        ".nan",
        ".inf",
        "''",
        "[]",
        "{}",
        "[1, 2]",
        "{a: 1}",
        "&a *a",
        "*b",
        "!!x",
    ),
    *(
        "<<: {}",
        "? a",
        "- a",
        "|",
        ">",
        "'",
        '"',
        "#",
        ":",
        "\t",
        "\x00",
        "\ufeff",
        "%",
        "@",
        "`",
        "🙂",
        "~",
        "$X",
        "999999999999",
    ),
]


def mutated(draw: random.Random) -> str:
    """Return the valid text with a few lines doubled, dropped, moved, indented or given another value."""
    lines = VALID.splitlines()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        kind = draw.choice(["drop", "double", "move", "indent", "value", "value", "value", "key", "noise", "cut"])
        if kind == "drop" and len(lines) > 1:
            lines.pop(at)
        elif kind == "double":
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif kind == "move":
            lines.insert(draw.randrange(len(lines)), lines.pop(at))
        elif kind == "indent":
            lines[at] = " " * draw.randint(0, 6) + lines[at].lstrip()
        elif kind == "value":
            lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(WORDS)}"
        elif kind == "key":
            lines[at] = lines[at].replace(":", draw.choice(["s:", "", "::", " :", ".x:"]), 1)
        elif kind == "noise":
            place = draw.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + draw.choice(WORDS) + lines[at][place:]
        else:
            lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
    return "\n".join(lines)


def random_override(draw: random.Random) -> str:
    path = draw.choice(
        [*NUMBERS, "model", "moe", "data.sources", "data.sources.0", "name", "runs_dir", "deepspeed.x.y"]
    )
    return f"{path}{draw.choice(['', '', '', '.0', '.x', '..', ' '])}={draw.choice([*WORDS, '2', '4', '1e-3', '0.5'])}"


@pytest.mark.parametrize("count", [120, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_fuzz_configs(count: int, tmp_path: Path) -> None:
    """A mutated config is refused with messages that name a key, a line or the command line, or can be planned."""
    draw = random.Random(31)
    outcomes = {"tried": count, "refused": 0, "planned": 0}
    for number in range(count):
        in_text = number % 2 == 0
        path = write(tmp_path, mutated(draw) if in_text else VALID)
        overrides = [] if in_text else [random_override(draw) for _ in range(draw.randint(1, 3))]
        outcomes[outcome_of(path, overrides)] += 1
    print(outcomes)
    assert outcomes["refused"] > outcomes["planned"] >= (count > 1000)


def test_every_refusal_of_a_mutated_text_says_where(tmp_path: Path) -> None:
    draw = random.Random(32)
    for _ in range(60):
        path = write(tmp_path, mutated(draw))
        try:
            load_config(path)
        except ConfigError as error:
            problems = [problem for problem in error.problems if not problem.startswith("... and")]
            assert all(re.search(rf"{re.escape(str(path))}(:\d+)?\)?", problem) for problem in problems), problems
