"""An evaluation is of the same text, and has the same loss, on any number of ranks and with any micro-batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource, ValidationLoader, prepare
from dsmoe.model import build_model
from dsmoe.parallel import Groups
from dsmoe.plan.elastic import fit_to_world
from dsmoe.plan.topology import Topology
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.evaluate import HeldOut, evaluate
from tests.helpers.small_runs import small_config, this_rank

SEQUENCES = 24


def losses(config: Config, ranks: int, source: PreparedSource) -> list[float]:
    """The loss with each micro-batch of 1 to 8."""
    found = []
    for size in range(1, 9):
        update = {"micro_batch_size": size, "batch_tokens": size * ranks * config.train.sequence_length}
        here = config.model_copy(update={"train": config.train.model_copy(update=update)})
        groups = Groups(Topology.from_config(here), timedelta(seconds=60))
        model = build_model(here, groups, this_rank().device)
        loader = ValidationLoader(source, here, groups.coordinate("data"), ranks)
        assert loader.num_sequences == SEQUENCES
        found.append(evaluate(model, [HeldOut(source, loader)], this_rank().device)["eval/loss"])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_loss_is_the_same_on_any_ranks_with_any_micro_batch(ranks: int, tmp_path: Path) -> None:
    def config(number: int) -> Config:
        train = {"eval_sequences": SEQUENCES, "batch_tokens": number * 32}
        return small_config(tmp_path, ranks=number, train=train, data={"validation_fraction": 0.2})

    (source,) = prepare(config(1))
    ((one, *_),) = run_ranks(1, losses, config(1), 1, source)
    found = run_ranks(ranks, losses, config(ranks), ranks, source)
    assert [loss for of_rank in found for loss in of_rank] == pytest.approx([one] * 8 * ranks, rel=1e-6)


@pytest.mark.parametrize("amount", [{"eval_sequences": SEQUENCES, "eval_batches": None}, {"eval_batches": 3}, {}])
def test_an_elastic_run_evaluates_the_same_sequences_on_all_devices(amount: dict, tmp_path: Path) -> None:
    train = {"eval_sequences": None, **amount, "micro_batch_size": 8, "batch_tokens": 96 * 32}
    given = small_config(tmp_path, ranks=4, train=train, data={"validation_fraction": 0.5})
    (source,) = prepare(given)
    evaluated, sizes = set(), set()
    for devices in (4, 2, 3, 6, 8):
        here = fit_to_world(given, 1, devices)
        sizes.add(here.train.micro_batch_size)
        evaluated.add(ValidationLoader(source, here, 0, devices).sequences().tobytes())
    assert len(sizes) > 1
    assert len(evaluated) == 1
