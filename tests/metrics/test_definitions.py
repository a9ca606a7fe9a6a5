"""Every metric that is written is defined, every definition is written, and no name is written twice."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.schema import Config
from dsmoe.metrics import definitions
from dsmoe.metrics.definitions import GROUPS, METRICS, find
from dsmoe.metrics.metric import Metric, When, pattern
from dsmoe.metrics.sinks import JsonLines
from dsmoe.runtime.spawn import run_ranks
from tests.helpers.small_runs import make_trainer, small_config
from tests.helpers.sources import sources

Line = dict[str, Any]
NAMES = {name: metric for metric in METRICS for name in metric.names}


def train_and_read(configs: Mapping[str, Config]) -> dict[str, list[Line]]:
    """The lines of metrics.jsonl of a whole run on one rank, for each config."""
    lines = {}
    for kind, config in configs.items():
        trainer, file = make_trainer(config), Path(config.runs_dir) / "metrics.jsonl"
        trainer.sinks = [JsonLines(file, resume_step=-1)]
        trainer.evaluate()
        assert trainer.run()
        lines[kind] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return lines


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Line]]:
    """Of a dense run without anything that adds metrics, and of a MoE run with all of it; both save and evaluate."""
    often: dict[str, Any] = {"train": {"steps": 2, "eval_every": 1, "batch_tokens": 64}, "checkpoint": {"every": 1}}
    capacity = {"factor": 1.0, "target_drop_percent": 1.0}
    configs = {
        "dense": small_config(tmp_path_factory.mktemp("dense"), **often, moe=None, model={"dense_layers": 0}),
        "moe": small_config(
            tmp_path_factory.mktemp("moe"),
            **often,
            cluster={"device": {"memory_gib": 1.0, "peak_tflops": 0.5}},
            moe={"capacity": capacity},
            observe={"layer_detail_every": 2},
        ),
    }
    return run_ranks(1, train_and_read, configs)[0]


def names_of(line: Line) -> set[str]:
    """The names and patterns in the definitions of a line's keys; a key without one stands for itself."""
    keys = line.keys() - {"step", "time"}
    found = {key: [name for name in NAMES if pattern(name).fullmatch(key)] for key in keys}
    assert all(len(names) <= 1 for names in found.values()), found
    return {names[0] if names else key for key, names in found.items()}


def expected(*whens: When, layers: bool = False) -> set[str]:
    return {name for name, metric in NAMES.items() if metric.when in whens and (layers or "<layer>" not in name)}


def test_a_dense_run_writes_the_metrics_of_every_run(lines: dict[str, list[Line]]) -> None:
    saved = definitions.CHECKPOINT_STALL_SECONDS.name
    for line in lines["dense"]:
        if definitions.TRAIN_LOSS.name in line:
            assert names_of(line) - {saved} == expected(When.TRAINING)
            assert (saved in line) == (line["step"] == 2)
        else:
            assert names_of(line) == expected(When.EVALUATION)


def test_a_moe_run_writes_every_metric_that_is_defined(lines: dict[str, list[Line]]) -> None:
    always = (When.TRAINING, When.MOE, When.PEAK_KNOWN, When.DROP_RATE_HELD)
    for line in lines["moe"]:
        if definitions.TRAIN_LOSS.name in line:
            wanted = expected(*always, layers=line["step"] % 2 == 0)
            assert names_of(line) - {definitions.CHECKPOINT_STALL_SECONDS.name} == wanted
    assert set.union(*map(names_of, lines["moe"])) == set(NAMES)


def test_keys_lead_back_to_their_definition(lines: dict[str, list[Line]]) -> None:
    for line in lines["moe"]:
        for key in line.keys() - {"step", "time"}:
            metric = find(key)
            assert metric is not None
            part = metric.variable_part(key)
            assert key in metric.names or "layer_001" in key or metric.name_for(str(part)) == key
    assert find("moe/load") is find("eval/sums") is find("train/loss/mean") is None
    assert definitions.EVAL_SOURCE_LOSS.variable_part("eval/a/b.c/loss") == "a/b.c"
    assert definitions.EVAL_SOURCE_LOSS.variable_part(definitions.EVAL_LOSS.name) is None
    assert definitions.EVAL_LOSS.variable_part(definitions.EVAL_LOSS.name) is None


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_definition_is_called_as_its_metric_is_named(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z]+(/([a-z0-9_]+|<[a-z_]+>))+", metric.name)
    assert metric.group in GROUPS
    assert getattr(definitions, re.sub("[/<>]+", "_", metric.name).upper()) is metric
    assert metric.meaning[0].isupper()
    assert not metric.meaning.endswith(".")
    assert not metric.in_every_layer or metric.reduction.layers
    assert [other for other in METRICS if set(other.names) & set(metric.names)] == [metric]


def test_names_of_the_layers_and_of_their_mean() -> None:
    assert definitions.MOE_LOAD_CV.names == ("moe/load_cv", "moe/load_cv/mean", "moe/layer_<layer>/load_cv")
    assert definitions.MOE_Z_LOSS.names == ("moe/z_loss", "moe/layer_<layer>/z_loss")
    assert definitions.MOE_LOAD_CV.in_layer(3) == "moe/layer_003/load_cv"
    assert definitions.EVAL_SOURCE_LOSS.name_for(r"a\1") == r"eval/a\1/loss"


HOLE = "\0"
NAMES_ARE_MADE_IN = {"dsmoe/metrics/definitions.py", "dsmoe/metrics/metric.py"}


def written_names(text: str) -> Iterator[str]:
    """The string literals of a file that name a metric, or make a name or a part of one; docstrings may."""
    tree = ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in docstrings | parts:
            continue
        if isinstance(node, ast.JoinedStr):
            values = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            literal = "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            literal = re.sub(r"\{[^{}]*\}|%[sd]", HOLE, node.value)
        else:
            continue
        if "/" in literal and (literal in ENDS or any(map(names_a_metric, re.findall(rf"[\w/<>{HOLE}]+", literal)))):
            yield literal


ENDS = {f"{metric.group}/" for metric in METRICS} | {"/" + name.rpartition("/")[2] for name in NAMES}
"""What a name could be put together from: `"moe/" + figure`, `key.endswith("/loss")`."""
EXAMPLES = [re.sub("<[a-z_]+>", "x", name) for name in NAMES]
SEGMENTS = {segment for name in NAMES for segment in name.split("/")}


def names_a_metric(word: str) -> bool:
    """Whether a word is a metric's name, or has a segment of one and holes with which it can become one."""
    if SEGMENTS.isdisjoint(word.split("/")):
        return False
    possible = re.compile(re.escape(word).replace(re.escape(HOLE), ".+"))
    return any(pattern(name).fullmatch(word) for name in NAMES) or any(map(possible.fullmatch, EXAMPLES))


def test_a_name_is_written_once_in_the_package() -> None:
    found = {
        file: names
        for file, text in sources("dsmoe").items()
        if (names := [repr(name) for name in written_names(text)])
    }
    assert found.keys() >= {"dsmoe/metrics/definitions.py"}
    assert not {file: names for file, names in found.items() if file not in NAMES_ARE_MADE_IN}


@pytest.mark.parametrize(
    "code",
    [
        "'train/loss'",
        "metrics['moe/load_cv/mean']",
        "'moe/layer_003/load_cv'",
        "'eval/books/loss'",
        "'see eval/loss, which is too low'",
        "f'eval/{source}/loss'",
        "f'moe/{name}'",
        "f'moe/layer_{index:03d}/{name}'",
        "f'{group}/loss'",
        "'eval/{}/loss'.format(source)",
        "'moe/%s' % name",
        "'moe/' + name",
        "key.endswith('/bits_per_byte')",
    ],
)
def test_what_names_a_metric(code: str) -> None:
    assert list(written_names(code if "=" in code else f"x = {code}"))


@pytest.mark.parametrize(
    "code",
    [
        "'loss'",
        "'dsmoe/moe/layer.py'",
        "f'{folder}/{name}'",
        "'train/losses'",
        "'moe'",
        "'/'",
        "f'{folder}/metrics.jsonl'",
    ],
)
def test_what_names_no_metric(code: str) -> None:
    assert not list(written_names(f"x = {code}"))


def test_docstrings_may_name_metrics() -> None:
    assert not list(written_names('def f():\n    """See `moe/load_cv`."""\n'))
