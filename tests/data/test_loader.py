from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe.data import PreparedSource, TrainLoader, ValidationLoader
from dsmoe.data.checksummed_files import DamagedCacheError, write_file
from tests.data.conftest import MakeConfig

SPEC = {"name": "unused", "path": "unused"}


def write_source(folder: Path, train: int, validation: int, name: str = "a", weight: float = 1.0) -> PreparedSource:
    """Write a source whose tokens are their own positions, so that a batch shows where it was read."""
    folder.mkdir()
    for split, tokens in (("train", train), ("validation", validation)):
        write_file(folder / f"{split}.bin", np.arange(tokens, dtype="<u2").tobytes())
    return PreparedSource(name, weight, folder, np.dtype("<u2"), train, train, validation, validation, 2**16 - 1)


def rows(loader: TrainLoader, step: int) -> list[list[int]]:
    return [row for batch in loader.micro_batches(step) for row in batch.tolist()]


def test_micro_batches_have_the_promised_shape_and_content(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 96, "micro_batch_size": 3, "sequence_length": 8})
    loader = TrainLoader([write_source(tmp_path / "a", 1000, 10)], config, 0, 2)
    batches = list(loader.micro_batches(0))
    assert [batch.shape for batch in batches] == [(3, 9), (3, 9)]
    for batch in batches:
        assert batch.dtype == torch.int64
        assert (batch[:, 0] % 8 == 0).all()
        assert torch.equal(batch, batch[:, :1] + torch.arange(9))


@pytest.mark.parametrize("degree", [2, 4])
def test_all_ranks_together_read_what_one_rank_reads(degree: int, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 16 * 8, "micro_batch_size": 2, "sequence_length": 8})
    sources = [write_source(tmp_path / "a", 1000, 10), write_source(tmp_path / "b", 300, 10, "b", 0.3)]
    alone = TrainLoader(sources, config, 0, 1)
    ranks = [TrainLoader(sources, config, rank, degree) for rank in range(degree)]
    for step in (0, 1, 77):
        expected = [batch.tolist() for batch in alone.micro_batches(step)]
        of_rank = [[batch.tolist() for batch in loader.micro_batches(step)] for loader in ranks]
        assert {len(batches) for batches in of_rank} == {8 // degree}
        dealt = [of_rank[number % degree][number // degree] for number in range(8)]
        assert dealt == expected


def test_every_target_once_per_epoch(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 4 * 8, "micro_batch_size": 2, "sequence_length": 8})
    loader = TrainLoader([write_source(tmp_path / "a", 20 * 8 + 6, 10)], config, 0, 1)
    assert loader.epochs(0) == {"a": 0.0}
    assert loader.epochs(5) == {"a": 1.0}
    assert loader.epochs(7) == {"a": 1.4}
    for epoch in range(3):
        steps = range(5 * epoch, 5 * epoch + 5)
        targets = Counter(token for step in steps for row in rows(loader, step) for token in row[1:])
        assert targets == Counter(range(1, 20 * 8 + 1))


def test_steps_are_independent_of_history_and_differ(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC)
    source = write_source(tmp_path / "a", 5000, 10)
    loader = TrainLoader([source], config, 0, 1)
    before = [rows(loader, step) for step in range(6)]
    assert rows(TrainLoader([source], config, 0, 1), 5) == before[5]
    assert rows(loader, 0) == before[0] != before[1]
    other_seed = TrainLoader([source], make_config(SPEC, data={"seed": 1}), 0, 1)
    assert rows(other_seed, 0) != before[0]


def test_sources_are_read_by_weight(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 1024 * 8, "sequence_length": 8})
    sources = [
        write_source(tmp_path / "a", 8 * 256 + 1, 10, "a", 3.0),
        write_source(tmp_path / "b", 8 * 512 + 1, 10, "b"),
    ]
    epochs = TrainLoader(sources, config, 0, 1).epochs(2)
    assert epochs["a"] == pytest.approx(6.0, abs=2 / 256)
    assert epochs["b"] == pytest.approx(1.0, abs=2 / 512)


def test_the_order_of_the_sources_in_the_file_is_immaterial(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 64 * 8, "sequence_length": 8})
    sources = [
        write_source(tmp_path / name, 8 * 999, 10, name, weight) for name, weight in zip("abc", (3, 1, 1), strict=True)
    ]
    loaders = [TrainLoader(order, config, 0, 1) for order in (sources, sources[::-1], [*sources[1:], sources[0]])]
    assert rows(loaders[0], 7) == rows(loaders[1], 7) == rows(loaders[2], 7)


def test_text_that_is_left_out_is_never_read(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 4 * 8, "sequence_length": 8})
    ranges = ((0, 3), (40, 41), (80, 99), (155, 160))
    source = replace(write_source(tmp_path / "a", 20 * 8 + 6, 10), left_out=ranges)
    loader = TrainLoader([source], config, 0, 1)
    epoch = [row for step in range(3) for row in rows(loader, step)]
    gone = {token for begin, end in ranges for token in range(begin, end)}
    expected = [k for k in range(20) if not gone & set(range(8 * k, 8 * k + 9))]
    assert len(expected) == 12 == len(epoch)
    assert sorted(row[0] // 8 for row in epoch) == expected
    assert loader.epochs(3) == {"a": 1.0}


def test_a_damaged_sequence_is_found_when_it_is_read(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"batch_tokens": 8, "sequence_length": 8})
    source = write_source(tmp_path / "a", 60_000, 60_000)
    data = bytearray((source.folder / "train.bin").read_bytes())
    data[-1] ^= 1
    (source.folder / "train.bin").write_bytes(data)
    loader = TrainLoader([source], config, 0, 1)
    with pytest.raises(DamagedCacheError, match=r"the 64 KiB of train\.bin at byte 65,536 are not what was written"):
        [rows(loader, step) for step in range(40)]
    assert len(source.train_file.read(0, 32768)) == 32768


def test_a_batch_that_cannot_be_dealt_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_source(tmp_path / "a", 1000, 10)
    with pytest.raises(AssertionError):
        TrainLoader([source], make_config(SPEC, train={"batch_tokens": 64, "sequence_length": 8}), 0, 3)


def evaluated(loaders: list[ValidationLoader]) -> list[list[int]]:
    """Return the rows that count, in the order in which one rank would read them."""
    turns = zip(*loaders, strict=True)  # strict: every rank has as many micro-batches
    return [
        row
        for turn in turns
        for tokens, weight in turn
        for row, counts in zip(tokens.tolist(), weight.tolist(), strict=True)
        if counts
    ]


@pytest.mark.parametrize("validation_tokens", [9, 17, 100, 800, 5000])
def test_evaluation_does_not_depend_on_the_number_of_ranks(
    validation_tokens: int, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config(SPEC, train={"sequence_length": 8, "micro_batch_size": 3, "eval_sequences": 15})
    source = write_source(tmp_path / "a", 10, validation_tokens)
    expected = evaluated([ValidationLoader(source, config, 0, 1)])
    assert len(expected) == min(15, (validation_tokens - 1) // 8)
    assert len({row[0] for row in expected}) == len(expected)
    for degree in (1, 2, 4, 7):
        loaders = [ValidationLoader(source, config, rank, degree) for rank in range(degree)]
        assert evaluated(loaders) == expected
        assert {len(loader) for loader in loaders} == {len(list(loader)) for loader in loaders} == {len(loaders[0])}


def test_evaluation_is_evenly_spaced_and_padded(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(SPEC, train={"sequence_length": 8, "micro_batch_size": 4, "eval_sequences": 8})
    source = write_source(tmp_path / "a", 10, 8 * 80 + 1)
    (tokens, weight), (_, second) = ValidationLoader(source, config, 0, 1)
    assert tokens[:, 0].tolist() == [0, 80, 160, 240]
    assert (tokens.dtype, weight.dtype, tokens.shape) == (torch.int64, torch.float32, (4, 9))
    assert weight.tolist() == second.tolist() == [1, 1, 1, 1]
    small = write_source(tmp_path / "b", 10, 8 * 3 + 1)
    ((tokens, weight),) = ValidationLoader(small, config, 1, 2)
    assert weight.tolist() == [0, 0, 0, 0]
    assert tokens[:, 0].tolist() == [16, 16, 16, 16]


@pytest.mark.parametrize("old_key", [True, False])
def test_the_held_out_sequences_do_not_depend_on_the_micro_batch(
    old_key: bool, tmp_path: Path, make_config: MakeConfig
) -> None:
    source = write_source(tmp_path / "a", 10, 8 * 80 + 1)
    amount = {"eval_batches": 3} if old_key else {"eval_sequences": 24}
    found = []
    for size in range(1, 9):
        config = make_config(SPEC, train={"sequence_length": 8, "micro_batch_size": size, **amount})
        for degree in (1, 2, 3, 4):
            loaders = [ValidationLoader(source, config, rank, degree) for rank in range(degree)]
            found.append(evaluated(loaders))
    assert len(found[0]) == 24
    assert all(rows == found[0] for rows in found)
