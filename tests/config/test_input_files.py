"""`dsmoe config check` checks the files that a config names, also those of valid keys in a config with wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe.cli import main
from dsmoe.config import ConfigError, UserError, dump_config, load_config
from dsmoe.config.dump import flatten
from dsmoe.config.input_files import input_problems
from dsmoe.config.schema import Config
from dsmoe.config.suggestions import closest_key
from dsmoe.config.synonyms import ABSENT, NOTES, SYNONYMS, meant_by
from dsmoe.data import load_tokenizer
from dsmoe.data.check_sources import check_sources
from dsmoe.data.tokenizer import require_end_of_document
from tests.helpers.recipes import VALID, problems_of, write


def tokenizer(path: Path, size: int, end: str = "</s>", **added: int) -> Path:
    vocabulary = {end: 0, **{f"t{number}": number for number in range(1, size)}}
    flags = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    extra = [{"content": token, "id": number, **flags} for token, number in added.items()]
    path.write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": extra}),
        encoding="utf-8",
    )
    return path


def check(path: Path, *overrides: str) -> list[str]:
    try:
        load_config(path, overrides, input_problems, lambda config: check_sources(config).problems)
    except ConfigError as error:
        return error.problems
    return []


def test_all_that_is_missing_is_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, VALID)
    overrides = [
        *("data.sources.0.path=/no/corpus", "data.sources.1.path=/no/*.txt", "data.tokenizer=/no/tokenizer.json"),
        *("cluster.hostfile=/no/hosts", "checkpoint.resume=/no/step", "checkpoint.weights_from=/no/run"),
    ]
    assert main(["config", "check", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    for override in overrides:
        key, _, value = override.partition("=")
        assert any(f"{key}: " in line and value in line for line in error.splitlines()), override
    assert main(["config", "show", str(path), *overrides]) == 0  # runs on machines without these files


PATHS = ["runs_dir", "data.cache_dir", "data.tokenizer", "data.sources.0.path", "cluster.hostfile", "checkpoint.resume"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in [*PATHS, "checkpoint.weights_from"] for value in ('""', "$EMPTY")),
        *((key, '""') for key in ("data.sources.0.hub", "data.sources.0.split")),
    ],
)
def test_an_empty_path_is_not_the_working_directory(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    problems = problems_of(write(tmp_path, VALID), f"{key}={value}")
    assert any(problem.startswith(f"{key}: expected text that is not empty") for problem in problems)


@pytest.mark.parametrize(("size", "added"), [(258, {}), (257, {"<end>": 257})])
def test_a_tokenizer_larger_than_the_vocabulary(size: int, added: dict[str, int], tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "tokenizer.json", size, **added)
    (problem,) = check(write(tmp_path, VALID), f"data.tokenizer={file}")
    assert problem.startswith("model.vocab_size (257) is smaller than the vocabulary of data.tokenizer")
    assert "set model.vocab_size to 258 or more" in problem
    assert check(write(tmp_path, VALID), f"data.tokenizer={tokenizer(file, 257)}") == []


def test_a_tokenizer_of_which_nothing_ends_a_document(tmp_path: Path) -> None:
    """The message is the same as that of `prepare`."""
    file = tokenizer(tmp_path / "tokenizer.json", 200, "t0", **{"<|begin|>": 200, "<|the end|>": 201})
    path = write(tmp_path, VALID)
    (problem,) = check(path, f"data.tokenizer={file}")
    assert problem.startswith(f"data.tokenizer {file} has none of the usual end-of-document tokens (<|endoftext|>, ")
    special = ", for example of its special tokens: <|the end|>, <|begin|>"
    assert f"set data.end_of_document to the token that follows each{special} ({path}:" in problem
    config = load_config(path, [f"data.tokenizer={file}"])
    with pytest.raises(UserError) as refused:
        require_end_of_document(load_tokenizer(config), config)
    assert str(refused.value) in problem
    (problem,) = check(path, f"data.tokenizer={file}", "data.end_of_document=<none>")
    assert problem.startswith(
        f"data.end_of_document ('<none>') is no token of data.tokenizer {file}; set it to one{special}"
    )
    for end in ("t7", "<|the end|>"):
        assert check(path, f"data.tokenizer={file}", f"data.end_of_document={end}") == []
    assert check(path) == []  # the vocabulary has 256 bytes


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"vocab": 3}}', "\x00", "[" * 100_000])
def test_files_that_are_no_tokenizer(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, text, "tokenizer.json")
    (problem,) = check(write(tmp_path, VALID), f"data.tokenizer={file}")
    assert f"{file} is not a JSON file of the `tokenizers` library" in problem


def test_a_folder_in_place_of_a_tokenizer_and_of_a_checkpoint(tmp_path: Path) -> None:
    tokenizer(tmp_path / "tokenizer.json", 3)
    overrides = [f"data.tokenizer={tmp_path}", f"checkpoint.weights_from={tmp_path}"]
    second, first = check(write(tmp_path, VALID), *overrides)
    assert "did you mean" in first
    assert "is neither a checkpoint nor a run's folder" in second


@pytest.mark.parametrize("key", ["checkpoint.resume", "checkpoint.weights_from"])
def test_a_run_that_has_saved_nothing_is_no_checkpoint(key: str, tmp_path: Path) -> None:
    path, run = write(tmp_path, VALID), tmp_path / "runs" / "other"
    for name in ("step_00000008.partial", "step_00000009", "steps"):
        (run / "checkpoints" / name).mkdir(parents=True)
        if name != "step_00000009":
            write(run / "checkpoints" / name, "{}", "manifest.json")
    (problem,) = check(path, f"{key}={run}")
    assert problem.startswith(f"{key} is the folder of a run, {run}, that has no whole checkpoint")
    write(run / "checkpoints" / "step_00000009", "{}", "manifest.json")
    assert check(path, f"{key}={run}") == []
    assert check(path, f"{key}={run}/checkpoints/step_00000009") == []


def test_it_answers_without_torch(tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "tokenizer.json", 3)
    path = write(tmp_path, VALID)
    command = f"assert main({['config', 'check', str(path), f'data.tokenizer={file}']}) == 0"
    code = f"import sys; from dsmoe.cli import main; {command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "False"


def test_a_wrong_type_hides_nothing_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    problems = problems_of(path, "train.seed=x", "moe.top_k=9", "model.num_heads=5", "optimizer.min_lr=1")
    assert [problem.partition(" ")[0] for problem in problems] == [
        *("train.seed:", "model.num_heads", "moe.top_k", "optimizer.min_lr")
    ]


@pytest.mark.parametrize(
    "wrong", ["model=3", "train=[]", "data.sources=x", "moe.router=[1]", "cluster.nodes=x", "data=null"]
)
def test_a_wrong_section_is_no_traceback_and_brings_no_consequences(wrong: str, tmp_path: Path) -> None:
    first, *others = problems_of(write(tmp_path, VALID), wrong, "optimizer.min_lr=1")
    assert first.startswith(wrong.partition("=")[0])
    assert [problem.partition(" ")[0] for problem in others] == ["optimizer.min_lr"]


def test_a_mistyped_key_is_not_taken_for_its_default(tmp_path: Path) -> None:
    """In a section with an unknown key, a missing key may be the mistyped one, so no problem of it is reported."""
    problems = problems_of(
        write(tmp_path, VALID), "moe.top_kk=9", "moe.router.normalize_weight=false", "moe.num_experts=8"
    )
    assert len(problems) == 2


def test_every_synonym_is_of_a_key_and_none_is_a_key(tmp_path: Path) -> None:
    schema = Config.model_json_schema()
    paths: dict[str, Any] = {}

    def collect(section: dict[str, Any], prefix: str) -> None:
        for name, child in section["properties"].items():
            paths[f"{prefix}{name}"] = child
            for option in (child, *child.get("anyOf", [])):
                inner = schema["$defs"].get(option.get("$ref", "").rpartition("/")[2], {})
                if "properties" in inner:
                    collect(inner, f"{prefix}{name}.")

    collect(schema, "")
    names = {path.rpartition(".")[2] for path in paths}
    assert len(SYNONYMS) > 80
    assert {key for key in SYNONYMS.values() if key not in paths} == set()
    assert {name for name in SYNONYMS if name in names} == set()
    assert NOTES.keys() <= SYNONYMS.keys()
    assert not ABSENT.keys() & (SYNONYMS.keys() | names)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("moe.num_experts_per_tok", "'moe.top_k'"),
        ("parallel.ep_size", "'parallel.expert'"),
        ("moe.aux_loss_coef", "'moe.balance.aux_loss'"),
        ("learning_rate", "'optimizer.lr'"),
        ("train.gradient_accumulation_steps", "'train.batch_tokens' (tokens per step"),
        ("moe.moe-router-topk", "'moe.top_k'"),
        ("model.num_hidden_layers", "'model.num_layers'"),
        ("parallel.tp", "'parallel.tensor'"),
        ("moe.num_experts_per_token", "'moe.top_k'"),
        ("model.hidden_dim", "'model.hidden_size'"),
        ("bf16", "'train.precision' (bf16 or fp32)"),
        ("train.num_train_epochs", "'train.tokens' (in tokens, or train.steps"),
        ("moe.k", "'moe.top_k'"),
        ("model.dim", "'model.hidden_size'"),
        ("model.embed_dim", "'model.hidden_size'"),
        ("n_positions", "'model.max_sequence_length'"),
        ("model.block_size", "'model.max_sequence_length' (and train.sequence_length"),
        ("optimizer.max_lr", "'optimizer.lr'"),
        ("optimizer.wd", "'optimizer.weight_decay'"),
        ("adam_beta2", "'optimizer.betas' (a list of both)"),
        ("train.dtype", "'train.precision' (bf16 or fp32)"),
        ("max_length", "'train.sequence_length'"),
        ("train.save_every", "'checkpoint.every'"),
        ("mbs", "'train.micro_batch_size'"),
        ("train.epochs", "'train.tokens' (in tokens"),
        ("train.activation_checkpointing", "'train.recompute' (none, selective or full)"),
        ("data.val_split", "'data.validation_fraction'"),
        ("data.vocab_file", "'data.tokenizer'"),
        ("moe.dropless", "'moe.capacity.factor' (null drops none)"),
        ("moe.num_shared_experts", "'moe.shared_expert_ffn_size' (one expert of the width of all"),
    ],
)
def test_names_from_elsewhere_are_understood(key: str, meant: str, tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, VALID), f"{key}=1")
    assert problem.startswith(f"{key}: unknown key; here that is {meant}")
    assert meant_by("nothing_of_the_kind") == ""


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("parallel.pipeline_model_parallel_size", "there is no pipeline parallelism; use parallel.expert"),
        ("parallel.pp", "there is no pipeline parallelism; use parallel.expert"),
        ("parallel.pipeline", "there is no pipeline parallelism; use parallel.expert"),
        ("parallel.cp", "there is no context parallelism; "),
        ("parallel.dp", "the data degree follows from cluster and parallel.tensor"),
        ("train.compile", "no key compiles the model"),
        ("train.fp16", "there is no fp16; train.precision is bf16 or fp32"),
    ],
)
def test_names_without_a_counterpart_get_a_message(key: str, message: str, tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, VALID), f"{key}=1")
    assert problem.startswith(f"{key}: unknown key; {message}")


@pytest.mark.parametrize(
    "key",
    [
        *("optimizer.low_lr", "optimizer.max_beta", "train.save_batches"),
        *("model.mod_size", "model.byte_size", "model.tail_dim", "model.num_layers_dense", "moe.num_zero_experts"),
        *("data.vocab_dir", "checkpoint.keep_worst", "parallel.zero_phase", "cluster.nodes_per_device"),
    ],
)
def test_another_word_is_no_misspelling(key: str, tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, VALID), f"{key}=1")
    assert problem.startswith(f"{key}: unknown key; the keys here are ")


def misspelt(name: str) -> Iterator[str]:
    """Yield misspellings: a letter missing, doubled or changed, two letters exchanged, and words joined."""
    for i in range(len(name)):
        if name[i] != "_" and len(name) > 3:
            yield from (name[:i] + name[i + 1 :], name[: i + 1] + name[i:])
            yield name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]
    yield name.replace("_", "")


def test_misspellings_of_every_key_are_guessed(tmp_path: Path) -> None:
    guessed = missed = 0
    paths = list(flatten(load_config(write(tmp_path, VALID)).model_dump()))
    for path in paths:
        section, _, name = path.rpartition(".")
        if name.startswith(("inter_", "intra_")):  # misspellings of one of these keys are as near to the other
            continue
        own = [one.rpartition(".")[2] for one in paths if one.rpartition(".")[0] == section]
        for wrong in misspelt(name):
            guess = name if wrong == name else closest_key(wrong, own)
            assert guess in (name, ""), (wrong, guess)
            guessed, missed = guessed + (guess == name), missed + (guess == "")
    assert guessed > 1_000
    assert missed < 0.1 * guessed


# Paths: one rule for all keys.


def test_a_variable_that_is_not_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unset variable is reported for a missing file only, because a file's name may have a dollar sign."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOPE", raising=False)
    path = write(tmp_path, VALID)
    keys = ["data.tokenizer", "data.sources.0.path", *PATHS[4:], "checkpoint.weights_from"]
    problems = check(path, *(f"{key}=$NOPE/${{NOPE}}x" for key in keys))
    for key in keys:
        assert [
            f"{key}: there is no file or folder $NOPE/${{NOPE}}x (the environment has no variable NOPE) in" in problem
            for problem in problems
        ].count(True) == 1, (key, problems)
    (problem,) = check(path, "data.sources=[{name: a, path: '$NOPE*.txt'}]")
    assert "no file matches the glob $NOPE*.txt (the environment has no variable NOPE) in this folder" in problem
    for override in ("data.tokenizer=$NOPE/t.json", "data.sources.0.path=$NOPE/x"):
        assert main(["prepare", str(path), override]) == 2
        assert "(the environment has no variable NOPE)" in capsys.readouterr().err
    (problem,) = check(path, "data.sources.0.path=$$NOTHING/x")
    assert "no variable" not in problem
    write(tmp_path, "text " * 300, "$NOPE.txt")
    assert check(path, "data.sources=[{name: a, path: $NOPE.txt}]") == []


def test_home_and_variables_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    keys = [
        *("runs_dir", "data.cache_dir", "data.tokenizer", "data.sources.0.path", "cluster.hostfile"),
        *("checkpoint.resume", "checkpoint.weights_from"),
    ]
    path = write(tmp_path, VALID)
    for text, expected in {
        "~/x": "/home/me/x",
        "$SCRATCH/x": "/scratch/me/x",
        "${SCRATCH}x": "/scratch/mex",
        "a$$SCRATCH": "a$SCRATCH",
        "a$ b": "a$ b",
        "/a/$SCRATCH": "/a//scratch/me",
    }.items():
        config = load_config(path, [f"{key}={text}" for key in keys])
        found = [config.runs_dir, config.data.cache_dir, config.data.tokenizer, config.data.sources[0].path]
        found += [config.cluster.hostfile, config.checkpoint.resume, config.checkpoint.weights_from]
        assert found == [expected] * 7
        assert load_config(write(tmp_path, dump_config(config), "again.yaml")) == config
    monkeypatch.delenv("SCRATCH")
    problems = problems_of(path, *(f"{key}=${{SCRATCH}}/x" for key in keys))
    assert [problem.partition(":")[0] for problem in problems] == keys[:2]  # folders that dsmoe makes
    assert load_config(path, ["data.tokenizer=a$SCRATCH"]).data.tokenizer == "a$SCRATCH"
    assert all("no variable SCRATCH" in problem for problem in problems)
    (problem,) = problems_of(path, "runs_dir=~nobody_of_this_name/x")
    assert "there is no user" in problem
    (problem,) = problems_of(path, r'runs_dir="a\0b"')
    assert "runs_dir: a path cannot have a null character" in problem


def test_a_path_is_beside_the_file_that_says_it_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("conf/base/there.txt", "conf/base/t.json", "conf/both.txt", "both.txt", "here.txt"):
        write(tmp_path, "text", name)
    sources = "data: {tokenizer: t.json, sources: [{name: a, path: there.txt}, {name: b, path: '*.txt'}]}\n"
    write(tmp_path, sources, "conf/base/data.yaml")
    text = VALID[: VALID.index("data:")] + VALID[VALID.index("optimizer:") :]
    path = write(tmp_path, f"include: base/data.yaml\nruns_dir: base\n{text}", "conf/x.yaml").relative_to(tmp_path)
    config = load_config(path)
    assert (
        config.data.tokenizer == "conf/base/t.json"
    )  # relative to the file that has the path, not to the file that includes it
    assert [source.path for source in config.data.sources] == ["conf/base/there.txt", "conf/base/*.txt"]
    assert config.runs_dir == "base"  # a folder that dsmoe makes: in the working directory
    for value, expected in {"both.txt": "conf/both.txt", "here.txt": "here.txt", "none.txt": "none.txt"}.items():
        body = f"data: {{sources: [{{name: a, path: {value}}}]}}\n{text}"
        assert load_config(write(tmp_path, body, "conf/y.yaml").relative_to(tmp_path)).data.sources[0].path == expected
    over = ["data.sources=[{name: a, path: both.txt}]"]
    assert load_config(path, over).data.sources[0].path == "both.txt"  # from the command line: in the working directory
    assert load_config(tmp_path / path).data.tokenizer == str(tmp_path / "conf/base/t.json")
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config("runs/tiny/config.yaml") == config
    assert os.getcwd() == str(tmp_path)


def test_beside_a_linked_file_is_beside_what_it_leads_to(tmp_path: Path) -> None:
    """Globs beside the YAML file, and in folders whose names have magic characters."""
    body = VALID[VALID.index("model:") : VALID.index("data:")] + VALID[VALID.index("optimizer:") :]
    write(tmp_path, "text", "shared/data [v1]/a.txt")
    write(tmp_path, "{}", "shared/tok.json")
    write(tmp_path, body, "shared/rest.yaml")
    own = "name: x\ninclude: rest.yaml\ndata: {tokenizer: tok.json, sources: [{name: a, path: 'data [v1]/*.txt'}]}\n"
    write(tmp_path, own, "shared/run.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.yaml").symlink_to("../shared/run.yaml")
    data = load_config(tmp_path / "mine/run.yaml").data
    assert data.tokenizer == str(tmp_path / "shared/tok.json")
    assert data.sources[0].path == str(tmp_path / "shared/data [v1]/*.txt")
    write(tmp_path, "{}", "mine/tok.json")
    assert load_config(tmp_path / "mine/run.yaml").data.tokenizer == str(tmp_path / "mine/tok.json")
