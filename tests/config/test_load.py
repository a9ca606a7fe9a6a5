from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.config import Config, ConfigError, UserError, dump_config, load_config
from dsmoe.config.load import included_files
from dsmoe.config.paths import resolve_paths
from dsmoe.config.yaml_text import Node, parse_yaml, plain, write_yaml
from dsmoe.data import prepare
from tests.helpers.recipes import VALID, load, problems, problems_of, problems_with, write


def read(text: str) -> object:
    found: list[str] = []
    node = parse_yaml(text, lambda line: f"f:{line}", found)
    assert not found
    assert isinstance(node, Node)
    return plain(node)


# Valid configs


def test_the_valid_config_loads_with_its_values_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert isinstance(config, Config)
    assert (config.name, config.cluster.nodes, config.parallel.zero_stage) == ("tiny", 2, 1)
    assert config.moe is not None
    assert (config.moe.top_k, config.moe.capacity.factor) == (2, None)
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert [source.name for source in config.data.sources] == ["plays", "code"]


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    assert load_config(str(write(tmp_path, VALID))) == load(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    assert load_config(path).name == "tiny"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e-4", 3e-4),
        ("1E6", 1e6),
        ("1.5e+3", 1500.0),
        ("-2e2", -200.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000_000", 1_000_000),
        ("1_000.5", 1000.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ('"1e-4"', "1e-4"),
        ("!!str 12", "12"),
        ("!!float 12", 12.0),
        ("a # comment", "a"),
    ],
)
def test_words_and_numbers(text: str, value: object) -> None:
    result = read(text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "y", "N", "010", "0x1F", "12:30", "2026-01-31", "1__0", "e5", "1e", "=", "1.2.3"]
)
def test_words_that_other_yaml_readers_turn_into_something_else_stay_text(text: str) -> None:
    assert read(text) == text


def test_not_a_number_is_read() -> None:
    value = read(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_anchors_stand_for_what_they_name() -> None:
    assert read("{a: &x [1, 2], b: *x}") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(("text", "value"), [("1e9", 10**9), ("1_000_000", 10**6), ("8192.0", 8192)])
def test_integer_keys_take_whole_floats(tmp_path: Path, text: str, value: int) -> None:
    tokens = load(tmp_path, "train.steps=null", f"train.tokens={text}").train.tokens
    assert tokens == value
    assert type(tokens) is int


def test_float_keys_take_integers(tmp_path: Path) -> None:
    theta = load(tmp_path, "model.rope_theta=500000").model.rope_theta
    assert theta == 500_000.0
    assert type(theta) is float


@pytest.mark.parametrize(
    "key", ["train.eval_every", "checkpoint.every", "checkpoint.keep_every", "observe.layer_detail_every"]
)
def test_an_interval_of_0_is_never(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    path = write(tmp_path, VALID)
    assert getattr(getattr(load_config(path, [f"{key}=0"]), section), name) is None
    with pytest.raises(ConfigError, match=rf"{key}"):
        load_config(path, [f"{key}=false"])
    with pytest.raises(ConfigError, match=rf"{key}"):
        load_config(path, [f"{key}=-1"])


def test_a_choice_of_integers_takes_a_whole_float(tmp_path: Path) -> None:
    assert type(load(tmp_path, "parallel.zero_stage=2.0").parallel.zero_stage) is int


# Files that cannot be read


def test_missing_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "nope.yaml") == ["no such file: nope.yaml"]


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    assert problems_of(tmp_path / "configs") == ["expected a YAML file, got a directory: configs"]


def test_unreadable_name() -> None:
    assert problems_of("a\0b") == ["cannot be read: a\0b: embedded null byte"]


def test_a_file_as_a_folder_carries_the_systems_reason(tmp_path: Path) -> None:
    write(tmp_path, VALID)
    assert problems_of(tmp_path / "x.yaml" / "y.yaml") == ["cannot be read: y.yaml: Not a directory"]


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "null\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    assert problems_of(write(tmp_path, text)) == ["the file is empty: x.yaml"]


@pytest.mark.parametrize(("text", "got"), [("- a\n- 1\n", '["a", 1]'), ("hello\n", '"hello"')])
def test_top_level_that_is_no_mapping(tmp_path: Path, text: str, got: str) -> None:
    assert problems_of(write(tmp_path, text)) == [f"expected a mapping of keys, got {got} (x.yaml:1)"]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: tiny\nruns_dir: caf\xe9\n")
    assert problems_of(path) == ["not UTF-8 text: byte 0xe9 (x.yaml:2)"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nmodel: b: c\n", "not valid YAML: mapping values are not allowed here (x.yaml:2)"),
        (
            "name: a\nmodel:\n\tx: 1\n",
            "not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token "
            "(x.yaml:3)",
        ),
        (
            "name: [a\nmodel: 1\n",
            "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':' (x.yaml:2)",
        ),
        (
            "name: a\n---\nname: b\n",
            "not valid YAML: expected a single document in the stream, but found another document (x.yaml:2)",
        ),
        ("name: a\nx: \x07\n", "not valid YAML: the character '\\x07' is not allowed (x.yaml:2)"),
        ("name: " + "[" * 600, "not valid YAML: nested too deeply (x.yaml:1)"),
        ("name: *a\n", "not valid YAML: found undefined alias 'a' (x.yaml:1)"),
    ],
)
def test_yaml_syntax(tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(write(tmp_path, text)) == [problem]


# YAML that this reader refuses


def test_duplicate_keys_are_reported_with_both_places_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    edits = ("  hidden_size: 64\n", "  hidden_size: 64\n  hidden_size: 128\n"), ("  lr: 1e-3", "  lr: fast")
    assert problems_with(tmp_path, *edits) == [
        "model.hidden_size: duplicate key (x.yaml:9 and x.yaml:10)",
        'optimizer.lr: expected a number > 0, got "fast" (x.yaml:24)',
    ]


def test_a_duplicate_key_in_a_list_entry_has_its_index(tmp_path: Path) -> None:
    edit = ("    - name: code\n", "    - name: code\n      name: more\n")
    assert problems_with(tmp_path, edit) == ["data.sources.1.name: duplicate key (x.yaml:20 and x.yaml:21)"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("x: !!python/object/apply:os.system [ls]", "x: the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("x: !!set {a, b}", "x: the tag tag:yaml.org,2002:set"),
        ("x: !!timestamp 2026-01-31", "x: the tag tag:yaml.org,2002:timestamp"),
        ("x: !mine 3", "x: the tag !mine"),
    ],
)
def test_tags(tmp_path: Path, line: str, problem: str) -> None:
    assert f"{problem} is not supported (x.yaml:1)" in problems_of(write(tmp_path, f"{line}\n{VALID}"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("runs_dir: !!int abc", 'runs_dir: "abc" cannot be read as int (x.yaml:1)'),
        ('runs_dir: "\\ud800"', 'runs_dir: "\ud800" cannot be read as str (x.yaml:1)'),
        ("runs_dir: !!bool on", 'runs_dir: "on" cannot be read as bool (x.yaml:1)'),
        ("? [a, b]\n: 1", "a key must be a word (x.yaml:1)"),
        ("<<: {a: 1}", "merge keys (<<) are not supported; use include (x.yaml:1)"),
        ("deepspeed: &a {b: *a}", "deepspeed.b: the anchor contains itself (x.yaml:1)"),
    ],
)
def test_refused_yaml(tmp_path: Path, line: str, problem: str) -> None:
    assert problem in problems_of(write(tmp_path, f"{line}\n{VALID}"))


# include


def test_includes_merge_deep_later_wins_and_the_file_is_last(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base/a.yaml")
    write(tmp_path, "model: {num_layers: 6, rope_theta: 5e5}\noptimizer: {betas: [0.8, 0.9]}", "base/b.yaml")
    path = write(tmp_path, "include: [base/a.yaml, base/b.yaml]\nmodel: {num_layers: 8}\n")
    config = load_config(path)
    assert (config.model.num_layers, config.model.rope_theta, config.model.hidden_size) == (8, 5e5, 64)
    assert config.optimizer.betas == (0.8, 0.9)


def test_an_include_is_relative_to_the_file_it_stands_in_and_may_be_a_string(tmp_path: Path) -> None:
    write(tmp_path, VALID, "shared/base.yaml")
    write(tmp_path, "include: ../shared/base.yaml\nname: middle\n", "recipes/middle.yaml")
    assert load_config(write(tmp_path, "include: recipes/middle.yaml\n")).name == "middle"


def test_lists_and_null_replace(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base.yaml")
    text = (
        "include: base.yaml\nmoe: null\nparallel: {expert: 1}\nmodel: {ffn_size: 256}\n"
        "data: {sources: [{name: a, path: b}]}"
    )
    config = load_config(write(tmp_path, text))
    assert config.moe is None
    assert [source.name for source in config.data.sources] == ["a"]


def test_a_mapping_replaces_an_included_null(tmp_path: Path) -> None:
    write(tmp_path, VALID.replace("moe:\n  num_experts: 8\n  expert_ffn_size: 128\n", "moe: null\n"), "base.yaml")
    config = load_config(write(tmp_path, "include: base.yaml\nmoe: {num_experts: 4, expert_ffn_size: 64}"))
    assert config.moe is not None
    assert config.moe.num_experts == 4


@pytest.mark.parametrize("written", ["~/base.yaml", "$HOME/base.yaml", '["${WHERE}/base.yaml"]', "$WHERE/$$a.yaml"])
def test_an_include_follows_the_rule_of_all_paths(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WHERE", str(home))
    write(tmp_path, VALID, "home/base.yaml")
    write(tmp_path, VALID, "home/$a.yaml")
    path = write(tmp_path, f"include: {written}\nname: mine\n")
    assert load_config(path).name == "mine"
    ((_, file),) = included_files(path)
    assert file.parent == home


def test_an_include_in_the_home_of_nobody(tmp_path: Path) -> None:
    assert problems_of(write(tmp_path, "include: ~nobody.at.all/base.yaml\n")) == [
        "include: there is no user '~nobody.at.all'; write ./~nobody.at.all/base.yaml for a file (x.yaml:1)"
    ]


def test_the_same_file_may_be_included_twice_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base.yaml")
    write(tmp_path, "include: base.yaml\n", "a.yaml")
    write(tmp_path, "include: base.yaml\nname: b\n", "b.yaml")
    assert load_config(write(tmp_path, "include: [a.yaml, b.yaml]\n")).name == "b"


def test_a_problem_names_the_file_it_comes_from(tmp_path: Path) -> None:
    write(tmp_path, VALID.replace("vocab_size: 257", "vocab_size: many"), "base.yaml")
    path = write(tmp_path, "include: base.yaml\nmodel:\n  num_layers: -1\n")
    assert problems_of(path) == [
        'model.vocab_size: expected a whole number >= 1, got "many" (base.yaml:8)',
        "model.num_layers: expected a whole number >= 1, got -1 (x.yaml:3)",
    ]


def test_include_cycle(tmp_path: Path) -> None:
    write(tmp_path, "name: b\ninclude: x.yaml\n", "b.yaml")
    path = write(tmp_path, "include: b.yaml\n")
    assert problems_of(path) == ["include: a file must not include itself: x.yaml -> b.yaml -> x.yaml (b.yaml:2)"]


def test_every_include_is_read_before_giving_up(tmp_path: Path) -> None:
    write(tmp_path, "a: [\n", "a.yaml")
    assert problems_of(write(tmp_path, "include:\n  - a.yaml\n  - none.yaml\n")) == [
        "not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>' (a.yaml:2)",
        "no such file: none.yaml (included at x.yaml:3)",
    ]


@pytest.mark.parametrize(
    ("value", "got"), [("3", "3"), ("[a.yaml, 3]", '["a.yaml", 3]'), ("", "null"), (r'"a\0"', r'"a\u0000"')]
)
def test_include_that_names_no_file(tmp_path: Path, value: str, got: str) -> None:
    path = write(tmp_path, f"name: a\ninclude: {value}\n")
    assert problems_of(path) == [f"include: expected a file name or a list of file names, got {got} (x.yaml:2)"]


def test_links_that_go_round_are_named_where_they_are_included(tmp_path: Path) -> None:
    (tmp_path / "self.yaml").symlink_to("self.yaml")
    (tmp_path / "a.yaml").symlink_to("b.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    (tmp_path / "folder").symlink_to("folder")
    path = write(tmp_path, "include: [self.yaml, a.yaml, folder/c.yaml]\n")
    reason = "Too many levels of symbolic links (included at x.yaml:1)"
    names = ("self.yaml", "a.yaml", "folder/c.yaml")
    assert problems_of(path) == [f"cannot be read: {name}: {reason}" for name in names]


def test_a_link_that_has_become_circular_is_no_traceback(tmp_path: Path) -> None:
    """A relative path is searched beside the file that has it, even if that file has been replaced since."""
    (tmp_path / "x.yaml").symlink_to("x.yaml")
    tree = parse_yaml("data: {tokenizer: tokens.json}", lambda line: f"{tmp_path}/x.yaml:{line}", [])
    assert tree is not None
    problems: list[str] = []
    resolve_paths(tree, problems)
    assert problems == []


def test_an_include_whose_name_no_file_can_have_is_named_with_its_place(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, f"include: {'a' * 300}\n"))
    assert problem.startswith("cannot be read: aaa")
    assert problem.endswith("File name too long (included at x.yaml:1)")


@pytest.mark.parametrize("key", ["name", "data.sources.1.name"])
def test_a_name_is_short_enough_for_the_folders_that_have_it(tmp_path: Path, key: str) -> None:
    load(tmp_path, f"{key}={'n' * 128}")
    for length in (129, 255, 300):
        (problem,) = problems_of(write(tmp_path, VALID), f"{key}={'n' * length}")
        start = f'{key}: expected text of at most 128 characters, and there are {length}, got "nnn'
        assert problem.startswith(start)


def test_the_longest_name_has_room_in_a_cache(tmp_path: Path) -> None:
    name, text = "n" * 128, tmp_path / "corpus.txt"
    text.write_text("some words\n" * 1_000)
    sources = f"data.sources=[{{name: {name}, path: {text}}}]"
    config = load(tmp_path, sources, f"data.cache_dir={tmp_path / 'cache'}", "train.sequence_length=16")
    (source,) = prepare(config)
    assert source.name == name


# Overrides


def test_overrides_are_yaml_with_the_same_numbers(tmp_path: Path) -> None:
    sources = "data.sources=[{name: a, path: b, weight: 2}]"
    config = load(tmp_path, "moe.top_k=4", "optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.99]", sources, "name = on")
    assert config.moe is not None
    assert (config.moe.top_k, config.optimizer.lr, config.optimizer.betas) == (4, 3e-4, (0.8, 0.99))
    assert config.data.sources[0].weight == 2.0
    assert config.name == "on"


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "train.seed=1", "train.seed=2").train.seed == 2


def test_an_override_reaches_a_list_entry(tmp_path: Path) -> None:
    assert [s.weight for s in load(tmp_path, "data.sources.1.weight=2.5").data.sources] == [1.0, 2.5]


def test_an_override_may_replace_a_list_entry(tmp_path: Path) -> None:
    assert load(tmp_path, "data.sources.0={name: z, path: y}").data.sources[0].name == "z"


def test_an_override_keeps_text_after_the_first_equals_sign(tmp_path: Path) -> None:
    assert load(tmp_path, "data.sources.0.path=a=b").data.sources[0].path == "a=b"


def test_an_override_makes_a_section_that_the_file_does_not_have(tmp_path: Path) -> None:
    config = load(tmp_path, "cluster.device.memory_gib=80", "cluster.device.peak_tflops=989")
    assert config.model_dump()["cluster"]["device"] == {"memory_gib": 80.0, "peak_tflops": 989.0}


def test_an_override_makes_a_section_out_of_null(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "moe=null",
        "moe.num_experts=4",
        "moe.expert_ffn_size=64",
        "moe.router.normalize_weights=false",
        "moe.top_k=1",
    )
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k) == (4, 1)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("moe.top_k", "'moe.top_k': an override is written section.key=value, for example moe.top_k=4"),
        ("", "'': an override is written section.key=value, for example moe.top_k=4"),
        ("=3", "'=3': an override is written section.key=value, without empty names"),
        ("moe..top_k=3", "'moe..top_k=3': an override is written section.key=value, without empty names"),
        ("moe.top_k=", "'moe.top_k=': the value is missing; write moe.top_k=null for null"),
        ("moe.top_kk=3", "moe.top_kk: unknown key; did you mean 'top_k'?"),
        ("moe.top_k=two", 'moe.top_k: expected a whole number >= 1, got "two"'),
        ("moe={num_experts: 8}", "moe.expert_ffn_size: required key is missing"),
        ("data.sources.2.weight=1", "data.sources.2: no such entry; data.sources has 2, counted from 0"),
        ("data.sources.first.weight=1", "data.sources.first: no such entry; data.sources has 2, counted from 0"),
        ("name.first=a", 'name.first: cannot be set, because name is "tiny" and not a section'),
        ("moe={top_k: 2, top_k: 3, num_experts: 8, expert_ffn_size: 8}", "moe.top_k: duplicate key"),
        (
            "train.seed=[1",
            "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        (
            "include=a.yaml",
            "include: unknown key; the keys here are name, runs_dir, cluster, parallel, model, moe, data, optimizer, "
            "train, checkpoint, observe, deepspeed",
        ),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, problem: str) -> None:
    assert problems(tmp_path, override) == [f"{problem} (command line)"]


# Keys and values that the schema refuses


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            ("steps: 100", "steps: 100\n  top_k: 2"),
            "train.top_k: unknown key; it belongs to 'moe': moe.top_k (x.yaml:26)",
        ),
        (
            ("name: tiny", "name: tiny\nseed: 1"),
            "seed: unknown key; it belongs to 'data' or 'train': data.seed or train.seed (x.yaml:2)",
        ),
        (
            ("  expert: 4", "  expert: 4\n  runs_dir: x"),
            "parallel.runs_dir: unknown key; it belongs at the top level (x.yaml:7)",
        ),
        (
            ("data:\n", "data:\n  weight: 1\n"),
            "data.weight: unknown key; it belongs to 'data.sources': data.sources.0.weight (x.yaml:17)",
        ),
        (
            ("name: tiny", "name: tiny\nfactor: 1"),
            "factor: unknown key; it belongs to 'moe.capacity': moe.capacity.factor (x.yaml:2)",
        ),
        (
            ("  lr: 1e-3", "  lr: 1e-3\n  num_expert: 8"),
            "optimizer.num_expert: unknown key; did you mean 'moe.num_experts'? (x.yaml:24)",
        ),
        (
            ("  expert: 4", "  expert: 4\n  q: 1"),
            "parallel.q: unknown key; the keys here are tensor, expert, expert_tensor, sequence, all_to_all, "
            "overlap_chunks, zero_stage (x.yaml:7)",
        ),
        (
            ("name: tiny", "name: tiny\nmoe.top_k: 2"),
            "moe.top_k: unknown key; dots are for the command line, in a file a section is indented below its name "
            "(x.yaml:2)",
        ),
        (
            ("      path: builtin:python", "      path: builtin:python\n      pth: x"),
            "data.sources.1.pth: unknown key; did you mean 'path'? (x.yaml:22)",
        ),
        (("  vocab_size: 257\n", ""), "model.vocab_size: required key is missing (section at x.yaml:7)"),
        (("name: tiny\n", ""), "name: required key is missing (x.yaml)"),
        (("optimizer:\n  lr: 1e-3\n", ""), "optimizer: required section is missing (x.yaml)"),
        (("- name: code\n      path", "- path"), "data.sources.1.name: required key is missing (section at x.yaml:20)"),
        (("lr: 1e-3", "lr: fast"), 'optimizer.lr: expected a number > 0, got "fast" (x.yaml:23)'),
        (("lr: 1e-3", "lr: 0"), "optimizer.lr: expected a number > 0, got 0 (x.yaml:23)"),
        (("lr: 1e-3", "lr: true"), "optimizer.lr: expected a number > 0, got true (x.yaml:23)"),
        (("lr: 1e-3", "lr: .inf"), "optimizer.lr: expected a finite number > 0, got .inf (x.yaml:23)"),
        (("lr: 1e-3", "lr: .nan"), "optimizer.lr: expected a finite number > 0, got .nan (x.yaml:23)"),
        (("nodes: 2", "nodes: true"), "cluster.nodes: expected a whole number >= 1, got true (x.yaml:3)"),
        (("nodes: 2", "nodes: 2.5"), "cluster.nodes: expected a whole number >= 1, got 2.5 (x.yaml:3)"),
        (("nodes: 2", 'nodes: "2"'), 'cluster.nodes: expected a whole number >= 1, got "2" (x.yaml:3)'),
        (("nodes: 2", "nodes: -.inf"), "cluster.nodes: expected a whole number >= 1, got -.inf (x.yaml:3)"),
        (("num_experts: 8", "num_experts: 1"), "moe.num_experts: expected a whole number >= 2, got 1 (x.yaml:14)"),
        (("steps: 100", "steps: 0"), "train.steps: expected a whole number >= 1 or null, got 0 (x.yaml:25)"),
        (
            ("name: tiny", "name: 7"),
            "name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got 7; put it in quotes (x.yaml:1)",
        ),
        (
            ("name: tiny", "name: my run"),
            'name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got "my run" (x.yaml:1)',
        ),
        (
            ("name: tiny", "name: .."),
            'name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got ".." (x.yaml:1)',
        ),
        (
            ("name: plays", "name: ."),
            'data.sources.0.name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got "." (x.yaml:18)',
        ),
        (
            ("name: tiny", 'name: tiny\nruns_dir: ""'),
            'runs_dir: expected text that is not empty, got "" (x.yaml:2)',
        ),
        (
            ("data:", 'data:\n  cache_dir: ""'),
            'data.cache_dir: expected text that is not empty, got "" (x.yaml:17)',
        ),
        (
            ("name: tiny", "name: tiny\nruns_dir: 2026"),
            "runs_dir: expected text that is not empty, got 2026; put it in quotes (x.yaml:2)",
        ),
        (
            ("name: tiny", "name: tiny\nobserve: {tensorboard: yes}"),
            'observe.tensorboard: expected true or false, got "yes" (x.yaml:2)',
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  schedule: cosin"),
            "optimizer.schedule: expected one of cosine, wsd, linear, constant, got \"cosin\"; did you mean 'cosine'? "
            "(x.yaml:24)",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  schedule: 3"),
            "optimizer.schedule: expected one of cosine, wsd, linear, constant, got 3 (x.yaml:24)",
        ),
        (
            ("  expert: 4", "  expert: 4\n  zero_stage: 3"),
            "parallel.zero_stage: expected one of 0, 1, 2, got 3 (x.yaml:7)",
        ),
        (
            ("  expert: 4", "  expert: 4\n  zero_stage: true"),
            "parallel.zero_stage: expected one of 0, 1, 2, got true (x.yaml:7)",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  betas: [0.9]"),
            "optimizer.betas: expected a list of 2 entries, each a number >= 0 and < 1, got [0.9] (x.yaml:24)",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  betas: [0.1, 0.2, 0.3]"),
            "optimizer.betas: expected a list of 2 entries, each a number >= 0 and < 1, got [0.1, 0.2, 0.3] "
            "(x.yaml:24)",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  betas: [0.9, 1]"),
            "optimizer.betas.1: expected a number >= 0 and < 1, got 1 (x.yaml:24)",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3\n  betas: 0.9"),
            "optimizer.betas: expected a list of 2 entries, each a number >= 0 and < 1, got 0.9 (x.yaml:24)",
        ),
        (
            ("name: tiny", "name: tiny\ncheckpoint:"),
            "checkpoint: expected a mapping {every, keep, keep_every, keep_best, asynchronous, resume, weights_from}, "
            "got null; leave the key out to get its defaults (x.yaml:2)",
        ),
        (("name: tiny", "name: tiny\ndeepspeed: [a]"), 'deepspeed: expected a mapping, got ["a"] (x.yaml:2)'),
        (
            ("nodes: 2", "nodes: 2\n  device: 80"),
            "cluster.device: expected text that is not empty, a mapping {memory_gib, peak_tflops} or null, got 80 "
            "(x.yaml:4)",
        ),
        (
            ("nodes: 2", "nodes: 2\n  device: {memory_gib: 80}"),
            "cluster.device.peak_tflops: required key is missing (section at x.yaml:4)",
        ),
        (
            ("nodes: 2", "nodes: 2\n  device: {memory_gib: 0, peak_tflops: 9}"),
            "cluster.device.memory_gib: expected a number > 0, got 0 (x.yaml:4)",
        ),
        (
            ("nodes: 2", "nodes: 2\n  device: {memory_gib: 8, peak_tflops: 9, peak_tflop: 9}"),
            "cluster.device.peak_tflop: unknown key; did you mean 'peak_tflops'? (x.yaml:4)",
        ),
    ],
)
def test_wrong_key_or_value(tmp_path: Path, edit: tuple[str, str], problem: str) -> None:
    assert problems_with(tmp_path, edit) == [problem]


def test_a_misspelt_required_key_is_reported_as_unknown_and_as_missing(tmp_path: Path) -> None:
    assert problems_with(tmp_path, ("num_experts: 8", "num_expert: 8")) == [
        "moe.num_experts: required key is missing (section at x.yaml:13)",
        "moe.num_expert: unknown key; did you mean 'num_experts'? (x.yaml:14)",
    ]


def test_an_empty_list_of_sources(tmp_path: Path) -> None:
    assert problems(tmp_path, "data.sources=[]") == [
        "data.sources: expected a list of at least 1, got [] (command line)"
    ]


def test_wrong_entries_are_not_also_reported_as_a_list_that_is_too_short(tmp_path: Path) -> None:
    assert problems(tmp_path, "data.sources=[{name: 3}]") == [
        "data.sources.0.name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got 3; put it in quotes "
        "(command line)"
    ]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, f"train.seed={'a' * 200}")
    assert problem == f'train.seed: expected a whole number >= 0, got "{"a" * 56}... (command line)'


def test_a_renamed_section_is_reported_as_unknown_and_as_missing(tmp_path: Path) -> None:
    assert problems_with(tmp_path, ("model:", "modle:")) == [
        "model: required section is missing (x.yaml)",
        "modle: unknown key; did you mean 'model'? (x.yaml:7)",
    ]


def test_no_message_speaks_pydantic(tmp_path: Path) -> None:
    text = (
        "name: 1\ncluster: 3\nmodel: {a: 1}\nmoe: []\ndata: {sources: [3]}\noptimizer: {lr: x}\ntrain: {precision: 8}"
    )
    found = problems_of(write(tmp_path, text))
    assert len(found) > 10
    for word in ("Input", "pydantic", "http", "_error", "_type", "Field required", "Extra", "tuple", "dict"):
        assert not [problem for problem in found if word in problem]


# Problems of every kind together


def test_every_kind_of_problem_in_one_list(tmp_path: Path) -> None:
    text = VALID.replace("num_experts: 8", "num_expert: 8").replace("nodes: 2", "nodes: 2\n  nodes: 3")
    assert problems_of(write(tmp_path, text), "moe.top_k", "train.seed=x") == [
        "cluster.nodes: duplicate key (x.yaml:3 and x.yaml:4)",
        "'moe.top_k': an override is written section.key=value, for example moe.top_k=4 (command line)",
        "moe.num_experts: required key is missing (section at x.yaml:14)",
        "moe.num_expert: unknown key; did you mean 'num_experts'? (x.yaml:15)",
        'train.seed: expected a whole number >= 0, got "x" (command line)',
    ]


def test_cross_field_problems_carry_their_place_and_join_the_others(tmp_path: Path) -> None:
    edits = ("expert: 4", "expert: 3"), ("nodes: 2", "nodes: 2\n  nodes: 2")
    assert problems_with(tmp_path, *edits) == [
        "cluster.nodes: duplicate key (x.yaml:3 and x.yaml:4)",
        "parallel.expert (3) must divide moe.num_experts (8); nearest: 2 or 4 (x.yaml:7)",
        "parallel.expert * parallel.expert_tensor (3 * 1 = 3) must divide the number of devices (2 nodes x 4 = 8); "
        "nearest parallel.expert: 2 or 4 (x.yaml:7)",
    ]


def test_a_cross_field_problem_of_a_default_is_placed_at_its_section(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "moe.top_k=1")
    assert problem.startswith("moe.router.normalize_weights (true) with moe.top_k (1)")
    assert problem.endswith("(x.yaml:13)")


def test_one_problem_is_one_line() -> None:
    error = ConfigError(["a: wrong (x.yaml:1)"], "x.yaml")
    assert isinstance(error, UserError)
    assert str(error) == "a: wrong (x.yaml:1)"


def test_several_problems_are_a_list_below_a_heading() -> None:
    error = ConfigError(["a: wrong (x.yaml:1)", "b: wrong (x.yaml:2)"], "x.yaml")
    assert str(error) == "2 problems in x.yaml:\n  - a: wrong (x.yaml:1)\n  - b: wrong (x.yaml:2)"


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"], "x.yaml")))
    assert (error.problems, str(error)) == (["a", "b"], "2 problems in x.yaml:\n  - a\n  - b")


# Writing


def test_the_dump_loads_again_and_has_every_default(tmp_path: Path) -> None:
    section = "deepspeed={comms_logger: {prof_ops: ['1', '1e4', on]}, flops_profiler: {recompute_fwd_factor: 1e-9}}"
    config = load(tmp_path, "cluster.device={memory_gib: 80, peak_tflops: 9e2}", section)
    text = dump_config(config)
    assert load_config(write(tmp_path, text, "dump.yaml")) == config
    assert "drop_policy: probability\n" in text
    assert "layer_detail_every: null\n" in text


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["1e4", "on", "null", "~", "", "010", "true", "1_0", ".inf", "<<", "- a", "a: b", "#", "'", '"', "\t", "\x85", "="]
)
keys = words.filter(lambda word: word != "<<")  # reserved for merging
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=3), max_leaves=8)


@settings(deadline=None)  # the machine is shared
@given(trees)
def test_written_values_are_read_back_equal(tree: object) -> None:
    again = read(write_yaml({"x": tree}))
    assert repr(again) == repr({"x": tree})  # not ==, which takes 1, 1.0 and true for one another


@settings(deadline=None)  # the machine is shared
@given(st.integers(1, 10**12), st.floats(1e-12, 1.0), st.booleans(), st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]*\Z"))
def test_overrides_and_dump_keep_values(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lr: float, flag: bool, name: str
) -> None:
    folder = tmp_path_factory.mktemp("round")
    values = {"train.seed": seed, "optimizer.lr": lr, "model.qk_norm": flag, "name": name}
    config = load(folder, *(f"{key}={write_yaml(value).splitlines()[0]}" for key, value in values.items()))
    assert (config.train.seed, config.optimizer.lr, config.model.qk_norm, config.name) == (seed, lr, flag, name)
    assert load_config(write(folder, dump_config(config), "dump.yaml")) == config
