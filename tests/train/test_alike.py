"""One of two ranks has another config, corpus, cache or code: the run ends at once, and says what differs and where."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import dsmoe
from dsmoe.config import UserError, load_config
from dsmoe.config.schema import Config
from dsmoe.interop.export_tokenizer import byte_tokenizer_json
from dsmoe.model import build_model
from dsmoe.parallel import Groups
from dsmoe.plan import Topology
from dsmoe.runtime.consistency import MAX_SHOWN_ENTRIES, digest, explain, find_mismatch
from dsmoe.runtime.spawn import CONTEXT, run_ranks
from dsmoe.train import alike
from dsmoe.train.alike import data_fingerprint, run_fingerprint
from tests.helpers.ports import free_port
from tests.helpers.small_runs import small_config
from tests.train.test_run import Outcome, write_config

OTHERS = {
    "optimizer.lr=0.001": "optimizer.lr: 0.003 on rank 0; 0.001 on rank 1",
    "optimizer.weight_decay=0": "optimizer.weight_decay: 0.1 on rank 0; 0.0 on rank 1",
    "optimizer.schedule=linear": 'optimizer.schedule: "constant" on rank 0; "linear" on rank 1',
    "optimizer.grad_clip=0.1": "optimizer.grad_clip: 0.5 on rank 0; 0.1 on rank 1",
    "train.seed=1": "train.seed: 0 on rank 0; 1 on rank 1",
    "parallel.zero_stage=2": "parallel.zero_stage: 1 on rank 0; 2 on rank 1",
    "parallel.expert=1": "parallel.expert: 2 on rank 0; 1 on rank 1",
    "data.sources.0.text_field=body": 'data.sources.0.text_field: "text" on rank 0; "body" on rank 1',
    "data.validation_fraction=0.1": "data.validation_fraction: 0.05 on rank 0; 0.1 on rank 1",
    "train.precision=bf16": 'train.precision: "fp32" on rank 0; "bf16" on rank 1',
}
"""An override that only rank 1 has, and what is to be said of it, each host's name left out."""
REFUSED = {
    "moe.num_expert=4": "moe.num_expert: unknown key",
    "cluster.devices_per_node=3": "train.micro_batch_size * train.sequence_length (3 * 1 * 32 = 96)",
}
"""The same, of what is no config at all."""


def _rank(folder: str, rank: int, port: str, arguments: list[str], streams: str, node: str) -> None:
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0" if node else str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=port, LOCAL_WORLD_SIZE="1" if node else "2")
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{streams}/{name}{rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    from dsmoe.train import alike
    from dsmoe.train.run import main

    if node == "edited":
        alike._source_digest = lambda: f"source of rank {rank}"
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def two_ranks(folders: list[Path], first: list[str], second: list[str], node: str = "") -> list[Outcome]:
    """`pretrain.py` on two ranks of their own folders and arguments; on two nodes where `node` is said."""
    port = free_port()
    with tempfile.TemporaryDirectory() as streams:
        ranks = [
            CONTEXT.Process(target=_rank, args=(str(folder), rank, port, arguments, streams, node))
            for rank, (folder, arguments) in enumerate(zip(folders, (first, second), strict=True))
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(150)
            assert process.exitcode is not None, "did not end"
        texts = [
            [(Path(streams) / f"{name}{rank}").read_text(encoding="utf-8") for name in ("out", "err")]
            for rank in range(2)
        ]
        return [Outcome(process.exitcode or 0, *text) for process, text in zip(ranks, texts, strict=True)]


def write_two_ranks(folder: Path) -> list[str]:
    """The arguments of a run of two ranks."""
    return ["--config", str(write_config(folder, ranks=2, expert=2, train={"steps": 2}, runs_dir="runs"))]


def without_host(said: str) -> str:
    return re.sub(r"( on ranks? [-\d, ]+) on \S+$", r"\1", said, flags=re.MULTILINE)


@pytest.mark.parametrize("override", OTHERS)
def test_every_key_is_compared(override: str, tmp_path: Path) -> None:
    _, path = write_two_ranks(tmp_path)
    first, other = run_fingerprint(load_config(path)), run_fingerprint(load_config(path, [override]))
    assert digest(first) != digest(other)
    said = without_host(explain(first, [find_mismatch(1, other, first)], 1, 2))
    assert said.splitlines()[1:] == [f"  - {OTHERS[override]}"]


def assert_refused(outcomes: list[Outcome], folder: Path) -> None:
    """At once, and by one of the ranks."""
    first, second = outcomes
    assert (first.code, second.code) == (2, 2)
    assert "Traceback" not in first.err + second.err
    assert "error" not in second.err, "once for all"
    assert not (folder / "runs").exists()


def test_another_config_on_one_rank(tmp_path: Path) -> None:
    given = write_two_ranks(tmp_path)
    overrides = list(OTHERS)[:MAX_SHOWN_ENTRIES]
    outcomes = two_ranks([tmp_path] * 2, given, [*given, *overrides])
    assert_refused(outcomes, tmp_path)
    said = without_host(outcomes[0].err)
    assert "1 rank of 2 would not train what rank 0 does" in said
    for override in overrides:
        assert OTHERS[override] in said


@pytest.mark.parametrize("override", REFUSED)
def test_no_config_on_one_rank(override: str, tmp_path: Path) -> None:
    given = write_two_ranks(tmp_path)
    outcomes = two_ranks([tmp_path] * 2, given, [*given, override])
    assert_refused(outcomes, tmp_path)
    said = outcomes[0].err
    assert "1 rank of 2 cannot start:" in said
    assert REFUSED[override] in said
    assert "rank 1 on " in said


def test_other_code_on_one_rank(tmp_path: Path) -> None:
    given = [*write_two_ranks(tmp_path), "cluster.nodes=2", "cluster.devices_per_node=1"]
    first, second = two_ranks([tmp_path] * 2, given, given, node="edited")
    assert (first.code, second.code) == (2, 2)
    assert "dsmoe's source: source of rank 0 on rank 0; source of rank 1 on rank 1" in first.err


@pytest.mark.parametrize("what", ["corpus", "cache"])
def test_another_corpus_or_cache_on_one_node(what: str, tmp_path: Path) -> None:
    """Each node has a folder of its own, where paths are relative."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for number, node in enumerate(nodes):
        node.mkdir()
        text = f"{number if what == 'corpus' else 0} and a line of the corpus.\n" * 400
        (node / "corpus.txt").write_text(text, encoding="utf-8")
    data = {"sources": ({"name": "web", "path": "corpus.txt"},), "cache_dir": "cache"}
    write_config(tmp_path, expert=2, cluster={"nodes": 2, "devices_per_node": 1}, train={"steps": 2}, data=data)
    for node in nodes:
        shutil.copy(tmp_path / "config.yaml", node)
    if what == "cache":  # of another text whose file looked the same
        from dsmoe.data import prepare

        for node, word in zip(nodes, ("one", "two"), strict=True):
            os.utime(node / "corpus.txt", ns=(1, 1))
            (node / "corpus.txt").write_text(f"{word} and a line of the corpus.\n" * 400, encoding="utf-8")
            os.utime(node / "corpus.txt", ns=(1, 1))
            overrides = [f"data.sources.0.path={node / 'corpus.txt'}", f"data.cache_dir={node / 'cache'}"]
            prepare(load_config(node / "config.yaml", overrides))
    given = ["--config", "config.yaml"]
    outcomes = two_ranks(nodes, given, given, node="own folders")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "1 rank of 2 would not train what rank 0 does" in outcomes[0].err
    assert "data.sources web: " in outcomes[0].err


def own_program(configs: list[Config], tokenizers: list[str]) -> str:
    """A training loop of somebody's own, as far as its first step; what ends it, if anything."""
    config = configs[dist.get_rank()]
    if tokenizers:
        Path(config.data.tokenizer).write_text(tokenizers[dist.get_rank()], encoding="utf-8")
    try:
        groups = Groups(Topology.from_config(config))
        model = build_model(config, groups, torch.device("cpu"))
        engine, _, loader, _ = dsmoe.initialize(model=model, config=config, groups=groups)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    assert engine.gradient_accumulation_steps() == len(list(loader.micro_batches(0)))
    return ""


def changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("optimizer", "lr", 0.5, "optimizer.lr: 0.003 on rank 0; 0.5 on rank 1"),
        ("train", "seed", 3, "train.seed: 0 on rank 0; 3 on rank 1"),
        ("parallel", "expert", 1, "parallel.expert: 2 on rank 0; 1 on rank 1"),
    ],
    ids=["rate", "seed", "layout"],
)
def test_another_config_on_one_rank_of_a_program(
    section: str, key: str, value: object, said: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path, ranks=2, expert=2)
    first, second = run_ranks(2, own_program, [config, changed(config, section, **{key: value})], [])
    assert first == second
    assert first.startswith("RankMismatchError: 1 rank of 2 would not train what rank 0 does")
    assert said in first


def test_another_corpus_or_tokenizer_on_one_rank_of_a_program(tmp_path: Path) -> None:
    """Paths may differ: what is there may not."""
    config = small_config(tmp_path, ranks=2)
    places = []
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        (folder / "text.txt").write_text("A line of the corpus, and another.\n" * 400, encoding="utf-8")
        source = config.data.sources[0].model_copy(update={"path": str(folder / "text.txt")})
        place = {"sources": (source,), "cache_dir": str(folder / "cache"), "tokenizer": str(folder / "tok.json")}
        places.append(changed(config.model_copy(update={"runs_dir": str(folder)}), "data", **place))
    tokenizer = byte_tokenizer_json()
    assert run_ranks(2, own_program, places, [tokenizer] * 2) == ["", ""]
    said, _ = run_ranks(2, own_program, places, [tokenizer, f"{tokenizer} "])
    assert "data.tokenizer, its contents: sha256:" in said
    (tmp_path / "node1/text.txt").write_text("A line of the corpus, and one more.\n" * 400, encoding="utf-8")
    said, _ = run_ranks(2, own_program, places, [tokenizer] * 2)
    assert "data.sources sums: " in said


def test_no_path_is_in_the_fingerprint_and_all_else_is(tmp_path: Path) -> None:
    paths = {"runs_dir": "a", "cluster": {"hostfile": "b"}, "checkpoint": {"resume": "c", "weights_from": "d"}}
    fingerprint = run_fingerprint(small_config(tmp_path, **paths))  # type: ignore[arg-type]
    left_out = {"runs_dir", "cluster.hostfile", "checkpoint.resume", "checkpoint.weights_from", "data.cache_dir"}
    assert not (left_out | {"data.sources.0.path"}) & fingerprint.keys()
    fingerprint = run_fingerprint(small_config(tmp_path))
    assert fingerprint["checkpoint.resume"] == '"auto"'
    assert fingerprint["data.tokenizer"] == '"bytes"'
    assert (fingerprint["torch"], fingerprint["python"]) == (metadata.version("torch"), platform.python_version())


def test_the_code_is_compared_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "alike.py"
    monkeypatch.setattr(alike, "__file__", str(file))
    digests = set()
    for name, text in (("alike.py", "x = 1"), ("alike.py", "x = 2"), ("other.py", "x = 2")):
        file.unlink(missing_ok=True)
        file = file.with_name(name)
        file.write_text(text, encoding="utf-8")
        digests.add(alike._source_digest.__wrapped__())
    assert len(digests) == 3


def test_text_of_the_same_size_is_told_apart() -> None:
    sizes = {"name": "web", "train_tokens": 900, "validation_tokens": 100}
    sources = [SimpleNamespace(**sizes, checksum=checksum) for checksum in ("0a", "0b")]
    first, other = (data_fingerprint([source]) for source in sources)  # type: ignore[list-item]
    assert first.keys() == other.keys()
    assert digest(first) != digest(other)
